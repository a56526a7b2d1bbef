"""What a layer with a memory has besides its attention: a gate, and how its queries and keys stand to each other beyond the window.

Shapes: T tokens, H query heads, K key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmctx.attention.memory import Far, MemoryConfig
from mmctx.rope import RopeConfig, Rotary, rotate


class LayerMemory(nn.Module):
    """The learned part is `gate`, (H,): 0 at first, where what is found counts as what is near.

    Attributes:
        on: whether the layer looks beyond its window at all.
    """

    def __init__(self, config: MemoryConfig, rope: RopeConfig | None, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim, self.on = config, head_dim, True
        self.gate = nn.Parameter(torch.zeros(num_heads))
        self.set_rope(rope)

    def set_rope(self, rope: RopeConfig | None) -> None:
        """Takes over positions; None where they are learned, and nothing is rotated."""
        self._rotary = Rotary(rope, self.head_dim) if rope is not None else None
        self._angles: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # on a device once: copies wait for it

    def far(self, q: Tensor, k: Tensor, plain_q: Tensor, plain_k: Tensor, window: int) -> Far | None:
        """How far queries and keys stand to each other; None while it is off.

        Args:
            q, k: rotated, (T, H, d) and (T, K, d).
            plain_q, plain_k: before rotation.
            window: of the layer.
        """
        if not self.on:
            return None
        config = self.config
        if config.distances == "clamped" and self._rotary is not None:
            # Keys stand at 0, queries at the first distance that is not in the window.
            key = window, q.device, q.dtype
            if key not in self._angles:
                self._angles[key] = self._rotary(torch.tensor([window, 0], device=q.device), q.dtype)
            cos, sin = self._angles[key]
            q, k = rotate(plain_q, cos[:1], sin[:1]), rotate(plain_k, cos[1:], sin[1:])
        return Far(q, k, self.gate, config.top_k, config.tokens, config.search)


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """The model without its memory: its layers see their windows alone."""
    layers = [module for module in model.modules() if isinstance(module, LayerMemory)]
    before = [layer.on for layer in layers]
    try:
        for layer in layers:
            layer.on = False
        yield
    finally:
        for layer, on in zip(layers, before, strict=True):
            layer.on = on
