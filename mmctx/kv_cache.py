"""Keys and values kept between generation steps.

Shapes: B sequences, T tokens of this call, H query heads, K key/value heads, d head width, M slots of a cache row, P tokens of a prompt.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.attention import attention
from mmctx.attention.memory import Far, memory_attention
from mmctx.layout import DocumentLayout


class Cache(Protocol):
    """What came before the tokens of a call."""

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
        """Attends q (T, H, d) to the keys k (T, K, d) of this call and to those before: (T, H, d)."""
        ...


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
        self.far_keys: dict[int, Tensor] = {}
        """Of layers with a memory, which is all that the cache holds beyond the window: it grows past the trained context."""
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
        """Stores k and v (T, K, d) and attends q (T, H, d) to all that its sequence holds: (T, H, d)."""
        assert self.lengths is not None, "advance() comes before the layers"
        kept = [(self.keys, k), (self.values, v)]
        if far is not None and window is not None:
            kept.append((self.far_keys, far.k))
        if layer not in self.keys:
            for held, new in kept:
                held[layer] = self._rows(new, layout)
            if len(kept) == 2:
                return attention(q, k, v, layout, window=window, backend=backend)
            return memory_attention(q, k, v, layout, far, window=window or 0, backend=backend)
        row = torch.arange(len(q), device=q.device)
        for held, new in kept:
            held[layer][row, :, self.lengths - 1] = new
        keys, values = self.keys[layer], self.values[layer]
        slot = torch.arange(keys.shape[2], device=q.device)
        if far is not None and window is not None:
            distance = self.lengths[:, None, None] - 1 - slot  # (B, 1, M)
            found = remember(
                q[:, :, None], keys, values, far.q[:, :, None], self.far_keys[layer], far, distance, window=window
            )
            return found[:, :, 0]
        seen = slot < self.lengths[:, None]  # (B, M)
        if window is not None:
            seen &= slot >= self.lengths[:, None] - window
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )  # (B, H, 1, d)
        return out[:, :, 0]

    def _rows(self, new: Tensor, layout: DocumentLayout) -> Tensor:
        """(T, K, d) of packed documents -> rows with room to grow (B, K, M, d)."""
        shape = (len(layout.lengths), new.shape[1], layout.max_seqlen + self.max_new_tokens, new.shape[2])
        rows = new.new_zeros(shape)
        for row, part in enumerate(new.split(layout.lengths)):
            rows[row, :, : len(part)] = part.transpose(0, 1)
        return rows


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
        """Attends q (T, H, d) to the prompt and to the tokens of its own continuation, k and v (T, K, d): (T, H, d)."""
        keys, values = self._joined(self._cache.keys[layer], k), self._joined(self._cache.values[layer], v)
        distance = self.positions[:, None] - torch.cat(
            [torch.arange(self._prompt, device=q.device), self.positions]
        )  # (T, P + T)
        seen = distance >= 0
        seen[:, self._prompt :] &= self._owner[:, None] == self._owner
        if far is not None and window is not None:
            far_keys = self._joined(self._cache.far_keys[layer], far.k)
            queries = [x.transpose(0, 1)[None] for x in (q, far.q)]
            distance = distance.masked_fill(~seen, -1)[None]
            past = keys[None], values[None]
            found = remember(queries[0], *past, queries[1], far_keys[None], far, distance, window=window)
            return found[0].transpose(0, 1)
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

    def _joined(self, rows: Tensor, new: Tensor) -> Tensor:
        """What the prompt has (B, K, M, d) and what the continuations add (T, K, d): (K, P + T, d)."""
        return torch.cat([rows[self._row, :, : self._prompt], new.transpose(0, 1).to(rows.dtype)], dim=1)


def remember(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, far: Far, distance: Tensor, *, window: int
) -> Tensor:
    """`memory_attention` of a few queries, whose scores are laid out whole.

    Args:
        q, far_q: (B, H, n, d).
        k, v, far_k: (B, K, M, d).
        far: the gate, how many keys are found, how far back.
        distance: (B, n, M) from a key to a query, negative where it must not be seen.
        window: of the layer.

    Returns:
        (B, H, n, d).
    """
    groups, dtype = q.shape[1] // k.shape[1], torch.promote_types(k.dtype, torch.float32)
    q, far_q = (x.unflatten(1, (-1, groups)).to(dtype) for x in (q, far_q))  # (B, K, G, n, d)
    k, far_k, values = (x[:, :, None].to(dtype) for x in (k, far_k, v))  # (B, K, 1, M, d)
    distance = distance[:, None, None]  # (B, 1, 1, n, M)
    scale = q.shape[-1] ** -0.5
    near = (q @ k.mT * scale).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    beyond = (far_q @ far_k.mT * scale).masked_fill((distance < window) | (distance >= window + far.tokens), -torch.inf)
    best, place = beyond.topk(min(far.top_k, beyond.shape[-1]), dim=-1)
    found = torch.full_like(beyond, -torch.inf).scatter_(-1, place, best + far.gate.to(dtype).view(-1, groups, 1, 1))
    weights = torch.maximum(near, found).softmax(dim=-1)  # a key is near or beyond, never both
    return (weights @ values).flatten(1, 2).to(v.dtype)
