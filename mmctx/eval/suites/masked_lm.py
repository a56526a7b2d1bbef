"""Suite `masked_lm`: how often is the hidden token the likeliest one?"""

from __future__ import annotations

from typing import Any

from mmctx.eval.context import EvalContext
from mmctx.pack import PackedBatch


def evaluate_masked_lm(context: EvalContext) -> dict[str, Any]:
    """`{"accuracy", "n"}` over the masked positions of every held-out document; masks are drawn from the run's seed."""

    def score(batch: PackedBatch, objective: str) -> tuple[int, int]:
        positions = batch.label_positions.get(objective)
        if positions is None:
            return 0, 0
        hidden, right = context.model.encode(batch).index_select(0, positions), 0
        for states, labels in zip(hidden.split(1024), batch.labels[positions].split(1024), strict=True):
            right += int((context.model.next_token_logits(states).argmax(dim=-1) == labels).sum())
        return right, len(positions)

    right = count = 0
    for objective in context.names("masked_lm"):
        for found in context.map_batches("masked_lm", lambda batch, name=objective: score(batch, name), objective):
            right, count = right + found[0], count + found[1]
    return {"accuracy": right / count if count else None, "n": count}
