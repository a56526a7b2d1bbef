"""Bottleneck adapters behind a linear layer; see `AdapterTuning`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A linear layer and what is added to its output y: `y + up(gelu(down(y)))`, nothing at first. (T, in) -> (T, out).

    Args:
        base_layer: frozen by whoever tunes.
        width: of the bottleneck.
    """

    def __init__(self, base_layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        options = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        down = nn.Linear(base_layer.out_features, width, **options)
        up = nn.Linear(width, base_layer.out_features, **options)
        nn.init.normal_(down.weight, std=0.02)
        for tensor in (down.bias, up.weight, up.bias):
            nn.init.zeros_(tensor)
        self.bottleneck = nn.ModuleDict({"down": down, "up": up})

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.base_layer(x)
        return y + self.bottleneck["up"](F.gelu(self.bottleneck["down"](y)))
