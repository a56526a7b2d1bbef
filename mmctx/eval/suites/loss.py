"""Suite `loss`: mean held-out loss of each objective."""

from __future__ import annotations

from typing import Any

from mmctx.eval.context import EvalContext
from mmctx.pack import PackedBatch


def evaluate_loss(context: EvalContext) -> dict[str, Any]:
    """`{objective: {"held_out": mean, "n": predictions}}`. Similarity is scored among the candidates of each bin."""

    def score(batch: PackedBatch) -> dict[str, tuple[float, int]]:
        return {name: (float(loss.total), loss.count) for name, loss in context.model.losses(batch).items()}

    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for found in context.map_batches("loss", score):
        for name, (total, count) in found.items():
            totals[name] = totals.get(name, 0.0) + total
            counts[name] = counts.get(name, 0) + count
    return {name: {"held_out": totals[name] / count, "n": count} for name, count in counts.items() if count}
