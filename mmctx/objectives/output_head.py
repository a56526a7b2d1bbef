"""From hidden states to logits: a matrix, and BERT's further layer before it where the trunk has one.

Shapes: N states, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mmctx.objectives.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from mmctx.transformer import TransformerConfig


class HeadTransform(nn.Module):
    """Dense layer, GELU and norm, (N, D) -> (N, D), and the biases of the logits: the masked LM head of BERT (Devlin et al. 2019)."""

    def __init__(self, config: TransformerConfig, num_rows: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = config.make_norm(config.width)
        self.bias = nn.Parameter(self.dense.bias.new_zeros(num_rows))  # (V,)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states: Tensor) -> Tensor:
        """See the class."""
        return self.norm(F.gelu(self.dense(states), approximate=self.approximate))


class OutputHead(NamedTuple):
    """What objectives that predict tokens need of the model."""

    weight: Tensor
    """(V, D)."""
    transform: HeadTransform | None = None
    """What states pass before, with biases of the logits; None for the matrix alone."""

    def logits(self, states: Tensor, vocab_size: int) -> Tensor:
        """(N, vocab_size) of states (N, D)."""
        if self.transform is None:
            return states @ self.weight[:vocab_size].T
        return F.linear(self.transform(states), self.weight[:vocab_size], self.transform.bias[:vocab_size])

    def cross_entropy(self, states: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Summed over states (N, D) with labels (N,), see `linear_cross_entropy`."""
        bias = None
        if self.transform is not None:
            states, bias = self.transform(states), self.transform.bias
        return linear_cross_entropy(states, self.weight, labels, label_smoothing=label_smoothing, bias=bias)

    def nothing(self) -> Tensor:
        """Zero, attached to the graph, for batches without a label."""
        parameters = self.transform.parameters() if self.transform is not None else ()
        return sum(((p * 0).sum() for p in parameters), (self.weight * 0).sum())
