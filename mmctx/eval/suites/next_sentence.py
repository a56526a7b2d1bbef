"""Suite `next_sentence`: how often does the model tell a span that follows from one that does not?"""

from __future__ import annotations

from typing import Any

from mmctx.eval.context import EvalContext
from mmctx.pack import PackedBatch


def evaluate_next_sentence(context: EvalContext) -> dict[str, Any]:
    """`{"accuracy", "n"}` over one pair of every held-out text, drawn from the run's seed; chance is one half."""

    def score(batch: PackedBatch, objective: str) -> tuple[int, int]:
        if objective not in batch.label_positions:
            return 0, 0
        head: Any = context.model.objectives[objective]
        follows = head.scores(context.model.encode(batch), batch) > 0
        labels = batch.labels[batch.label_positions[objective]]
        return int((follows == labels.bool()).sum()), len(labels)

    right = count = 0
    for objective in context.names("next_sentence"):
        for found in context.map_batches("next_sentence", lambda batch, name=objective: score(batch, name), objective):
            right, count = right + found[0], count + found[1]
    return {"accuracy": right / count if count else None, "n": count}
