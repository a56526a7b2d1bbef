"""Keys and values kept between generation steps.

Shapes: B sequences, T tokens of this call, H query heads, K key/value heads, d head width, M slots of a cache row, P tokens of a prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.attention import attention
from mmctx.layout import DocumentLayout


class KVCache:
    """Per layer (B, K, M, d) keys and values, one row a sequence, filled from the left.

    The first call (prefill) takes B packed documents of any lengths; every later call takes one token a sequence.

    Args:
        max_new_tokens: tokens that will be generated at most, so that rows can be allocated once.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths: Tensor | None = None  # (B,) tokens held, the current call's included
        self.prompt_lengths: tuple[int, ...] = ()  # of the prefill, on the host

    def advance(self, layout: DocumentLayout) -> Tensor:
        """Makes room for this call's tokens and returns their positions (T,). Call once before the layers run."""
        new = torch.tensor(layout.lengths, device=layout.cu_seqlens.device)
        if self.lengths is None:
            self.lengths, self.prompt_lengths = new, layout.lengths
            return torch.cat([torch.arange(n, device=new.device) for n in layout.lengths])
        if any(n != 1 for n in layout.lengths):
            raise ValueError(f"after the prefill each sequence takes one token a call, found lengths {layout.lengths}")
        self.lengths = self.lengths + 1
        return self.lengths - 1

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, *, window: int | None, backend: str
    ) -> Tensor:
        """Stores k and v (T, K, d) and attends q (T, H, d) to all that its sequence holds: (T, H, d)."""
        assert self.lengths is not None, "advance() comes before the layers"
        if layer not in self.keys:
            self._prefill(layer, k, v, layout)
            return attention(q, k, v, layout, window=window, backend=backend)
        keys, values = self.keys[layer], self.values[layer]
        row = torch.arange(len(q), device=q.device)
        keys[row, :, self.lengths - 1] = k
        values[row, :, self.lengths - 1] = v
        slot = torch.arange(keys.shape[2], device=q.device)
        seen = slot < self.lengths[:, None]  # (B, M)
        if window is not None:
            seen &= slot >= self.lengths[:, None] - window
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )  # (B, H, 1, d)
        return out[:, :, 0]

    def _prefill(self, layer: int, k: Tensor, v: Tensor, layout: DocumentLayout) -> None:
        shape = (len(layout.lengths), k.shape[1], layout.max_seqlen + self.max_new_tokens, k.shape[2])
        self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for row, (kd, vd) in enumerate(zip(k.split(layout.lengths), v.split(layout.lengths), strict=True)):
            self.keys[layer][row, :, : len(kd)] = kd.transpose(0, 1)
            self.values[layer][row, :, : len(vd)] = vd.transpose(0, 1)


class Branches:
    """Several continuations of one prompt, all in one call: each sees the prompt and its own tokens before, none sees another.

    The prompt's keys and values are read where they lie, once for all continuations. The mask is (T, P + T), T being the tokens of some
    short answers: it does not grow with the square of the context.

    Args:
        cache: after its prefill.
        row: which of its sequences is continued.
        layout: lengths of the continuations.
    """

    @property
    def prompt_length(self) -> int:
        """P."""
        return self._prompt

    def __init__(self, cache: KVCache, row: int, layout: DocumentLayout) -> None:
        self._cache, self._row, self._prompt = cache, row, cache.prompt_lengths[row]
        device = layout.cu_seqlens.device
        lengths = torch.tensor(layout.lengths, device=device)
        self._owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)  # (T,)
        within = torch.cat([torch.arange(n, device=device) for n in layout.lengths])
        self.positions = self._prompt + within
        """(T,) in the continued sequence."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, *, window: int | None, backend: str
    ) -> Tensor:
        """Attends q (T, H, d) to the prompt and to the tokens of its own continuation, k and v (T, K, d): (T, H, d)."""
        keys, values = (held[layer][self._row, :, : self._prompt] for held in (self._cache.keys, self._cache.values))
        keys = torch.cat([keys, k.transpose(0, 1).to(keys.dtype)], dim=1)  # (K, P + T, d)
        values = torch.cat([values, v.transpose(0, 1).to(values.dtype)], dim=1)
        distance = self.positions[:, None] - torch.cat(
            [torch.arange(self._prompt, device=q.device), self.positions]
        )  # (T, P + T)
        seen = distance >= 0
        seen[:, self._prompt :] &= self._owner[:, None] == self._owner
        if window is not None:
            seen &= distance < window
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None].to(keys.dtype),
            keys[None],
            values[None],
            attn_mask=seen,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (1, H, T, d)
        return out[0].transpose(0, 1)
