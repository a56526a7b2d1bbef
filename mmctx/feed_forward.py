"""The MLP of a block, which treats every token by itself.

Shapes: T tokens, D width, F feed-forward width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["swiglu", "gelu", "gelu_tanh"]


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): (T, D) -> (T, D)."""

    def __init__(self, width: int, mlp_width: int, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=bias)
        self.down = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (T, F) each
        return self.down(F.silu(gate) * up)


class GELU(nn.Module):
    """Feed-forward with GELU (Hendrycks and Gimpel 2016), exact or by its approximation with tanh: (T, D) -> (T, D)."""

    def __init__(self, width: int, mlp_width: int, bias: bool, approximate: Literal["none", "tanh"]) -> None:
        super().__init__()
        self.up = nn.Linear(width, mlp_width, bias=bias)
        self.down = nn.Linear(mlp_width, width, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def build_feed_forward(width: int, mlp_width: int, activation: Activation, bias: bool) -> SwiGLU | GELU:
    """The MLP of this activation."""
    if activation == "swiglu":
        return SwiGLU(width, mlp_width, bias)
    return GELU(width, mlp_width, bias, "tanh" if activation == "gelu_tanh" else "none")
