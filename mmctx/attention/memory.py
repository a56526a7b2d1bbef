"""Attention with a memory (Memorizing Transformers, Wu et al. 2022): to a local window, and beyond it to the k most similar keys of the
same document's past.

One softmax runs over the window and what was found, and a gate per head is added to the scores of what was found. So with
lse = log-sum-exp of each part's scores, the output is the mix (1 - g) window + g memory of two attentions with

    g = sigmoid(gate + lse_memory - lse_window)

a gate as learned as theirs that also knows how well the memory matches. At gate 0, where it starts, and with k no less than the past, it is
full attention; with gate -inf it is the window alone. Theirs, a fixed mix, is neither.

Shapes: T tokens, H query heads, K key heads, G = H / K, L tokens of a document's piece, P tokens of its past, S = P + L, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmctx.attention import attention
from mmctx.attention.memory_tiles import attend_document
from mmctx.config import StrictModel
from mmctx.layout import DocumentLayout


class MemoryConfig(StrictModel):
    """Layers that look beyond their window by similarity. Their windows are those of `windows`."""

    layers: tuple[int, ...] = Field(min_length=1)
    """Which layers, counted from 0; each needs a window."""
    top_k: int = Field(default=32, ge=1)
    """Keys beyond the window that each query and head attends to."""
    tokens: int = Field(default=65536, ge=1)
    """Tokens beyond the window that can be found: the newest ones, older ones are forgotten first. It bounds what a stream carries."""
    distances: Literal["clamped", "exact"] = "clamped"
    """clamped: every key beyond the window is compared as if it stood right behind it, so that no distance is ever beyond what was
    trained. exact: at its own distance, which makes it full attention where `top_k` covers all."""
    search: Literal["torch", "faiss"] = "torch"
    """What searches, both exactly: faiss (`pip install 'mmctx[faiss]'`) on the host."""

    @field_validator("layers")
    @classmethod
    def _check(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(layers)) < len(layers) or min(layers) < 0:
            raise ValueError(f"layers must each be named once, counted from 0, found {list(layers)}")
        return layers


@dataclass(frozen=True, slots=True, eq=False)
class Far:
    """What a layer's queries look for beyond the window, and how.

    Attributes:
        q: (T, H, d) queries as they stand to far keys.
        k: (T, K, d) keys as they stand to far queries.
        gate: (H,) added to the scores of what was found.
        top_k, tokens, search: of the layer's `MemoryConfig`.
    """

    q: Tensor
    k: Tensor
    gate: Tensor
    top_k: int
    tokens: int
    search: str = "torch"


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """The newest tokens of a document before the piece of it that is read now, without gradient; (P, K, d) each."""

    k: Tensor
    v: Tensor
    far_k: Tensor


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    far: Far | None,
    *,
    window: int,
    backend: str = "auto",
    past: Past | None = None,
) -> Tensor:
    """As `mmctx.attention.attention` with a window, and beyond it `far`.

    Bidirectional documents have no past: they attend to their window, as do causal ones that are no longer than it.

    Args:
        q, k, v, layout, window, backend: as there.
        far: what to look for beyond the window; None for the window alone.
        past: of the first document, which must be causal.

    Returns:
        (T, H, d).
    """
    tensors: tuple[Tensor, ...] = (q, k, v) if far is None else (q, k, v, far.q, far.k)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        tensors = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    q, k, v, *beyond = tensors
    far = far and replace(far, q=beyond[0], k=beyond[1])
    lengths = layout.lengths
    reaching = [n for n in range(layout.num_causal) if lengths[n] > window or (n == 0 and past is not None)]
    if not reaching:
        out = attention(q, k, v, layout, window=window, backend=backend)
        if far is not None:  # the gate has a gradient whatever there is to read: other ranks may wait for it
            out = out + (far.gate.sum() * 0).to(out.dtype)
        return out
    parts = list(zip(*(x.split(lengths) for x in (q, k, v)), strict=True))
    outputs: dict[int, Tensor] = {}
    rest = [n for n in range(len(lengths)) if n not in reaching]
    if rest:
        some = _without(layout, reaching, rest)
        rest_q, rest_k, rest_v = (torch.cat([parts[n][i] for n in rest]) for i in range(3))
        found = attention(rest_q, rest_k, rest_v, some, window=window, backend=backend)
        outputs |= dict(zip(rest, found.split(some.lengths), strict=True))
    apart = None if far is None else list(zip(far.q.split(lengths), far.k.split(lengths), strict=True))
    for n in reaching:
        query, key, value = parts[n]
        far_q, far_k = (query, key) if apart is None else apart[n]
        if n == 0 and past is not None:
            key, value, far_k = (
                torch.cat([old.to(new.dtype), new])
                for old, new in ((past.k, key), (past.v, value), (past.far_k, far_k))
            )
        outputs[n] = _one_document(query, key, value, far_q, far_k, far, window)
    return torch.cat([outputs[n] for n in range(len(lengths))])


def _without(layout: DocumentLayout, reaching: list[int], rest: list[int]) -> DocumentLayout:
    """The layout of the other documents, made once for all layers."""
    key = ("memory", tuple(reaching))
    if key not in layout.cache:
        causal = sum(n < layout.num_causal for n in rest)
        device = layout.cu_seqlens.device
        layout.cache[key] = DocumentLayout.from_lengths([layout.lengths[n] for n in rest], causal, device)
    return layout.cache[key]


def _one_document(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, far: Far | None, window: int
) -> Tensor:
    """q and far_q (L, H, d), k, v and far_k (S, K, d), the piece standing last -> (L, H, d)."""
    groups = q.shape[1] // k.shape[1]
    gate = q.new_zeros(q.shape[1], dtype=torch.float32) if far is None else far.gate
    queries = [x.unflatten(1, (-1, groups)).permute(1, 2, 0, 3) for x in (q, far_q)]  # (K, G, L, d)
    keys = [x.transpose(0, 1) for x in (k, v, far_k)]  # (K, S, d)
    settings = (0, 1, "torch") if far is None else (far.top_k, far.tokens, far.search)
    out, _, _ = attend_document(*queries, *keys, gate.view(-1, groups), window, *settings)
    return out.permute(2, 0, 1, 3).flatten(1, 2)
