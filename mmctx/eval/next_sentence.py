"""Suite `next_sentence`: how often does the model tell a span that follows from one that does not?"""

from __future__ import annotations

from typing import Any

import torch

from mmctx.eval.context import EvalContext


@torch.no_grad()
def evaluate_next_sentence(context: EvalContext) -> dict[str, Any]:
    """`{"accuracy", "n"}` over one pair of every held-out text, drawn from the run's seed; chance is one half."""
    right, count = 0, 0
    for objective in context.names("next_sentence"):
        head: Any = context.model.objectives[objective]
        for batch in context.batches("next_sentence", objective):
            if objective not in batch.label_positions:
                continue
            follows = head.scores(context.model.encode(batch), batch) > 0
            labels = batch.labels[batch.label_positions[objective]]
            right += int((follows == labels.bool()).sum())
            count += len(labels)
    return {"accuracy": right / count if count else None, "n": count}
