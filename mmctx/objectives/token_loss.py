"""Model half of objectives that predict tokens: cross entropy at the positions that carry a label, and nowhere else.

`label_smoothing` e (Szegedy et al. 2016) aims at `(1 - e) onehot + e / V` instead of the one right token. V counts all rows of the output
head, the few that round the vocabulary up included.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from mmctx.objectives.base import LossSum, ObjectiveConfig
from mmctx.objectives.output_head import OutputHead
from mmctx.pack import PackedBatch


class TokenObjectiveConfig(ObjectiveConfig):
    """What every objective has that predicts tokens."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over the vocabulary while training; evaluation gives the plain loss. 0 costs nothing."""


class TokenLoss(nn.Module):
    """Cross entropy at this objective's labelled positions."""

    def __init__(self, name: str, config: TokenObjectiveConfig, width: int) -> None:
        super().__init__()
        self.name, self.label_smoothing = name, config.label_smoothing

    def count(self, batch: PackedBatch) -> int:
        """Labelled positions."""
        return len(batch.label_positions.get(self.name, ()))

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        """See `ModelHalf`."""
        positions = batch.label_positions.get(self.name)
        if positions is None:
            return LossSum((hidden * 0).sum() + head.nothing(), 0)
        labels, states = batch.labels.index_select(0, positions), hidden.index_select(0, positions)  # (K,), (K, D)
        smoothing = self.label_smoothing if self.training else 0.0
        return LossSum(head.cross_entropy(states, labels, smoothing), self.count(batch))
