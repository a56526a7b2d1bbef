"""Prefix tuning in packs: learned keys and values stand before the first token of every document, in the very call that all kernels have.

A document of L tokens is attended as one of P + L. Queries of the P places are zeros whose results are dropped, so no document sees
anything of another one's, and gradients reach the prefix from real tokens alone. It is exact on every backend, and costs P rows a document.

Shapes: T tokens, N documents, P virtual tokens, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.attention import attention
from mmctx.attention.memory import Far
from mmctx.errors import ConfigError
from mmctx.layout import DocumentLayout


class LayerPrefix(nn.Module):
    """The virtual tokens of one layer: `weight` (P, 2, K, d), keys as they are after rotation, and values."""

    def __init__(self, num_tokens: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, 2, kv_heads, head_dim))
        nn.init.normal_(self.weight, std=0.02)


class Prefix:
    """The virtual tokens of all layers.

    Args:
        layers: of each block.
    """

    def __init__(self, layers: Sequence[LayerPrefix]) -> None:
        self.layers = list(layers)
        self.num_tokens = len(layers[0].weight)

    def extend(self, layout: DocumentLayout) -> DocumentLayout:
        """The layout of documents that are longer by the prefix; made once for all layers."""
        if self._key not in layout.cache:
            device, count = layout.cu_seqlens.device, self.num_tokens
            longer = DocumentLayout.from_lengths([n + count for n in layout.lengths], layout.num_causal, device)
            document = torch.repeat_interleave(torch.arange(len(layout.lengths)), torch.tensor(layout.lengths))
            real = torch.arange(layout.num_tokens) + count * (document + 1)  # (T,)
            starts = torch.tensor([0, *longer.lengths[:-1]]).cumsum(dim=0)
            virtual = (starts[:, None] + torch.arange(count)).flatten()  # (N * P,)
            layout.cache[self._key] = longer, real.to(device), virtual.to(device)
        return layout.cache[self._key][0]

    def places(self, layout: DocumentLayout) -> tuple[Tensor, Tensor]:
        """Where, in the longer layout, real tokens (T,) and virtual ones (N * P,) are."""
        self.extend(layout)
        return layout.cache[self._key][1:]

    @property
    def _key(self) -> tuple[str, int]:
        return "prefix", self.num_tokens

    def before(self, cache: Any = None) -> PrefixedAttention:
        """What the trunk takes as its cache so that documents see the prefix; with a cache that is to be filled, that holds it, too."""
        return PrefixedAttention(self, cache)


class PrefixedAttention:
    """Attention whose documents begin with a prefix, with the signature of `KVCache.attend`."""

    def __init__(self, prefix: Prefix, cache: Any) -> None:
        self._prefix, self._cache = prefix, cache

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: DocumentLayout,
        *,
        window: int | None,
        backend: str,
        far: Far | None = None,
    ) -> Tensor:
        """Queries (T, H, d), keys and values (T, K, d) -> (T, H, d)."""
        if far is not None:
            raise ConfigError(
                "model.transformer.memory: a prefix stands before whole documents; tune by lora or adapter"
            )
        longer, (real, virtual) = self._prefix.extend(layout), self._prefix.places(layout)
        learned = self._prefix.layers[layer].weight.to(k.dtype)  # (P, 2, K, d)
        q = q.new_zeros(longer.num_tokens, *q.shape[1:]).index_copy(0, real, q)
        k, v = (
            x.new_zeros(longer.num_tokens, *x.shape[1:])
            .index_copy(0, real, x)
            .index_copy(0, virtual, learned[:, part].repeat(len(layout.lengths), 1, 1))
            for part, x in enumerate((k, v))
        )
        if self._cache is None:
            mixed = attention(q, k, v, longer, window=window, backend=backend)
        else:
            mixed = self._cache.attend(layer, q, k, v, longer, window=window, backend=backend)
        return mixed.index_select(0, real)
