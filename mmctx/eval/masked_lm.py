"""Suite `masked_lm`: how often is the hidden token the likeliest one?"""

from __future__ import annotations

from typing import Any

import torch

from mmctx.eval.context import EvalContext


@torch.no_grad()
def evaluate_masked_lm(context: EvalContext) -> dict[str, Any]:
    """`{"accuracy", "n"}` over the masked positions of every held-out document; masks are drawn from the run's seed."""
    right, count = 0, 0
    for objective in context.names("masked_lm"):
        for batch in context.batches("masked_lm", objective):
            positions = batch.label_positions.get(objective)
            if positions is None:
                continue
            hidden = context.model.encode(batch).index_select(0, positions)
            for states, labels in zip(hidden.split(1024), batch.labels[positions].split(1024), strict=True):
                right += int((context.model.next_token_logits(states).argmax(dim=-1) == labels).sum())
                count += len(labels)
    return {"accuracy": right / count if count else None, "n": count}
