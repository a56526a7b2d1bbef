"""Attention with a memory (Memorizing Transformers, Wu et al. 2022): to a local window, and beyond it to the k most similar keys of the
same document's past.

One softmax runs over the window and what was found, and a gate per head is added to the scores of what was found. So with
lse = log-sum-exp of each part's scores, the output is the mix (1 - g) window + g memory of two attentions with

    g = sigmoid(gate + lse_memory - lse_window)

a gate as learned as theirs that also knows how well the memory matches. At gate 0, where it starts, and with k no less than the past, it is
full attention; with gate -inf it is the window alone. Theirs, a fixed mix, is neither.

The search takes no gradient; keys and values that it found do. Everything goes tile by tile, in the backward pass too: beside results, a
tile of queries is all that exists, so memory grows with T (k numbers of keys for each query and head) and never with T^2.

Shapes: T tokens, H query heads, K key heads, G = H / K, L tokens of a document's piece, P tokens of its past, S = P + L, d head width,
n queries of a tile, m keys in their window, k keys found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmctx.attention import attention
from mmctx.attention.search import QUERIES, search
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
    out, _, _ = _attend(*queries, *keys, gate.view(-1, groups), window, *settings)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def attend_tiles(
    q: Tensor,
    far_q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor,
    gate: Tensor,
    window: int,
    top_k: int,
    tokens: int,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One document. An operator, so that selective checkpointing can keep its results and does not search again.

    Returns:
        (K, G, L, d) of the type of q, log-sum-exp of the scores (K, G, L), numbers of the keys that were found (K, G, L, k) int32.
    """
    first = k.shape[1] - q.shape[2]
    ids = search(far_q, far_k, first=first, window=window, tokens=tokens, top_k=top_k, engine=engine)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_precise(q))
    for tile in _tiles(q, far_q, k, v, far_k, gate, ids, window):
        local, found = tile.scores()
        lse_tile = torch.cat([local, found], dim=-1).logsumexp(dim=-1, keepdim=True)  # (K, G, n, 1)
        mixed = _times(local.sub_(lse_tile).exp_(), tile.v) + _sum(found.sub_(lse_tile).exp_(), tile.found_v)
        out[:, :, tile.queries] = mixed.to(out.dtype)
        lse[:, :, tile.queries] = lse_tile[..., 0]
    return out, lse, ids


_attend = torch.library.custom_op("mmctx::memory_attention", attend_tiles, mutates_args=())


@_attend.register_fake
def _(q, far_q, k, v, far_k, gate, window, top_k, tokens, engine):
    count = max(min(top_k, tokens, k.shape[1] - window), 0)
    shape = q.shape[:3]
    return (
        q.new_empty(q.shape),
        q.new_empty(shape, dtype=_precise(q)),
        q.new_empty((*shape, count), dtype=torch.int32),
    )


def attend_tiles_backward(
    grad: Tensor,
    q: Tensor,
    far_q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor,
    gate: Tensor,
    out: Tensor,
    lse: Tensor,
    ids: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, far_q, k, v, far_k and the gate."""
    inputs, dtype = (q, far_q, k, v, far_k, gate), _precise(q)
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs]
    d_q, d_far_q, d_k, d_v, d_far_k, d_gate = grads
    scale = q.shape[3] ** -0.5
    for tile in _tiles(*inputs, ids, window):
        local, found = tile.scores()
        d_out = grad[:, :, tile.queries].to(dtype)  # (K, G, n, d)
        lse_tile = lse[:, :, tile.queries, None]
        delta = (d_out * out[:, :, tile.queries].to(dtype)).sum(dim=-1, keepdim=True)
        local, found = local.sub_(lse_tile).exp_(), found.sub_(lse_tile).exp_()  # probabilities
        d_v[:, tile.keys] += local.flatten(1, 2).mT @ d_out.flatten(1, 2)
        d_local = local * (_times(d_out, tile.v.mT) - delta) * scale
        d_q[:, :, tile.queries] = _times(d_local, tile.k)
        d_k[:, tile.keys] += d_local.flatten(1, 2).mT @ tile.q.flatten(1, 2)
        if tile.rows is None:
            continue
        d_found = found * ((tile.found_v @ d_out[..., None])[..., 0] - delta)  # (K, G, n, k)
        d_gate += d_found.sum(dim=(2, 3))
        d_found *= scale
        d_far_q[:, :, tile.queries] = _sum(d_found, tile.found_k)
        rows = tile.rows.flatten()
        d_far_k.flatten(0, 1).index_add_(0, rows, (d_found[..., None] * tile.far_q[..., None, :]).flatten(0, 3))
        d_v.flatten(0, 1).index_add_(0, rows, (found[..., None] * d_out[..., None, :]).flatten(0, 3))
    return tuple(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))  # type: ignore[return-value]


_attend_backward = torch.library.custom_op("mmctx::memory_attention_backward", attend_tiles_backward, mutates_args=())


@_attend_backward.register_fake
def _(grad, q, far_q, k, v, far_k, gate, out, lse, ids, window):
    return tuple(x.new_empty(x.shape) for x in (q, far_q, k, v, far_k, gate))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.window = inputs[6]


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return (*_attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.window), None, None, None, None)


_attend.register_autograd(_backward, setup_context=_setup_context)


@dataclass(slots=True)
class _Tile:
    """Some queries of a document and all that they see.

    Attributes:
        queries: which.
        keys: those in the window of any of them.
        q, far_q: (K, G, n, d).
        k, v: (K, m, d).
        gate: (K, G, 1, 1).
        hidden: (n, m) bool, keys outside a query's window.
        rows: (K, G, n, k) int64 where what was found lies among the keys of all heads; None where nothing was.
        missing: (K, G, n, k) bool, places that hold nothing.
        found_k, found_v: (K, G, n, k, d).
    """

    queries: slice
    keys: slice
    q: Tensor
    far_q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    hidden: Tensor
    rows: Tensor | None
    missing: Tensor
    found_k: Tensor
    found_v: Tensor

    def scores(self) -> tuple[Tensor, Tensor]:
        """Of the window (K, G, n, m) and of what was found (K, G, n, k); -inf where there is nothing to see."""
        scale = self.q.shape[-1] ** -0.5
        local = _times(self.q, self.k.mT).mul_(scale).masked_fill_(self.hidden, -torch.inf)
        found = (self.found_k @ self.far_q[..., None])[..., 0] * scale + self.gate
        return local, found.masked_fill(self.missing, -torch.inf)


def _tiles(
    q: Tensor, far_q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, gate: Tensor, ids: Tensor, window: int
) -> Iterator[_Tile]:
    num_keys, length, dtype = k.shape[1], q.shape[2], _precise(q)
    first = num_keys - length
    heads = torch.arange(k.shape[0], device=q.device)[:, None, None, None] * num_keys
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        queries, keys = slice(start, stop), slice(max(first + start - window + 1, 0), first + stop)
        distance = torch.arange(first + start, first + stop, device=q.device)[:, None] - torch.arange(
            keys.start, keys.stop, device=q.device
        )
        found = ids[:, :, queries].long()  # (K, G, n, k)
        if first + stop - 1 < window:
            found = found[..., :0]
        rows = found.clamp(min=0) + heads
        found_k, found_v = (
            x.flatten(0, 1).index_select(0, rows.flatten()).to(dtype).unflatten(0, rows.shape) for x in (far_k, v)
        )
        yield _Tile(
            queries,
            keys,
            q[:, :, queries].to(dtype),
            far_q[:, :, queries].to(dtype),
            k[:, keys].to(dtype),
            v[:, keys].to(dtype),
            gate[..., None, None].to(dtype),
            (distance < 0) | (distance >= window),
            rows if rows.shape[-1] else None,
            found < 0,
            found_k,
            found_v,
        )


def _precise(x: Tensor) -> torch.dtype:
    """What scores and sums are in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _times(a: Tensor, b: Tensor) -> Tensor:
    """(K, G, n, x) times (K, x, y) -> (K, G, n, y): all heads of a key head in one product."""
    return (a.flatten(1, 2) @ b).unflatten(1, a.shape[1:3])


def _sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Weights (K, G, n, k), rows (K, G, n, k, d) -> (K, G, n, d)."""
    return (weights[..., None, :] @ rows)[..., 0, :]
