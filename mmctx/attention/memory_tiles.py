"""The arithmetic of `mmctx.attention.memory`, for one document: tile by tile, forward and backward.

The search takes no gradient; keys and values that it found do. Beside results, a tile of queries is all that exists, so memory grows with
the tokens (k numbers of keys for each query and head) and never with their square.

Shapes: K key heads, G query heads of each, L queries, S keys, d head width, n queries of a tile, m keys in their window, k keys found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmctx.attention.search import QUERIES, search


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


attend_document = torch.library.custom_op("mmctx::memory_attention", attend_tiles, mutates_args=())
"""The operator: `attend_tiles`, with its gradients."""


@attend_document.register_fake
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


attend_document.register_autograd(_backward, setup_context=_setup_context)


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
