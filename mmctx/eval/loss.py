"""Suite `loss`: mean held-out loss of each objective."""

from __future__ import annotations

from typing import Any

import torch

from mmctx.eval.context import EvalContext


@torch.no_grad()
def evaluate_loss(context: EvalContext) -> dict[str, Any]:
    """`{objective: {"held_out": mean, "n": predictions}}`. Similarity is scored among the candidates of each bin."""
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for batch in context.batches("loss"):
        for name, loss in context.model.losses(batch).items():
            totals[name] = totals.get(name, 0.0) + float(loss.total)
            counts[name] = counts.get(name, 0) + loss.count
    return {name: {"held_out": totals[name] / count, "n": count} for name, count in counts.items() if count}
