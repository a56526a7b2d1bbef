"""Attention over tokens that lie on several ranks: an all-to-all before it turns shares of tokens into shares of heads, one after it back.

After DeepSpeed-Ulysses (Jacobs et al. 2023). Between the two, every rank has all T tokens for its share of the heads and attends by the
usual backends, so documents, windows and both directions need no further thought. A rank holds as many numbers as before, cut otherwise.

Shapes: T tokens, S ranks, t tokens of a rank, H query heads, K key and value heads, d head width, h = H / S, k key heads of a rank.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from mmctx.attention import attention
from mmctx.attention.memory import Far, memory_attention
from mmctx.layout import DocumentLayout
from mmctx.parallel.exchange import RowExchange


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    window: int | None = None,
    backend: str = "auto",
    far: Far | None = None,
) -> Tensor:
    """`mmctx.attention.attention`, or with `far` `memory_attention`, of this rank's tokens to all tokens of their documents, wherever
    those lie.

    Without `layout.shards` all tokens are here, and it is `attention` itself.

    Args:
        q: (t, H, d); H must be a multiple of S.
        k: (t, K, d); K may be less than S.
        v: (t, K, d).
        layout: of all T tokens.
        window, backend: as there.
        far: what to look for beyond the window, of this rank's tokens.

    Returns:
        (t, H, d).
    """
    shards = layout.shards
    if shards is None:
        return _attend(q, k, v, layout, window, backend, far)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # before the exchange, which then moves half as much
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
        far = far and replace(far, q=far.q.to(q.dtype), k=far.k.to(k.dtype))
    num_tokens, size = len(q), len(shards.sizes)
    repeats = key_head_repeats(q.shape[1], k.shape[1], size)
    keys = [k, v] if far is None else [k, v, far.k]
    if repeats > 1:  # its backward sums over the copies
        keys = [x.repeat_interleave(repeats, dim=1) for x in keys]
    exchange = RowExchange((num_tokens,) * size, shards.sizes, shards.group)
    tensors = [q, *keys] if far is None else [q, *keys, far.q]
    heads = [x.shape[1] // size for x in tensors]
    shares = [x.unflatten(1, (size, n)).transpose(0, 1) for x, n in zip(tensors, heads, strict=True)]  # (S, t, h, d)
    everyone = exchange(torch.cat(shares, dim=2).flatten(0, 1))  # (S * t, h + 2k, d) -> (T, h + 2k, d)
    q, k, v, *rest = everyone.split(heads, dim=1)
    if far is not None:
        gate = far.gate.unflatten(0, (size, -1))[shards.rank]
        far = replace(far, k=rest[0], q=rest[1], gate=gate)
    mixed = _attend(q, k, v, layout, window, backend, far)  # (T, h, d)
    own = exchange.back()(mixed).unflatten(0, (size, num_tokens))  # (S, t, h, d)
    return own.transpose(0, 1).flatten(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None, backend: str, far: Far | None
) -> Tensor:
    if far is None or window is None:
        return attention(q, k, v, layout, window=window, backend=backend)
    return memory_attention(q, k, v, layout, far, window=window, backend=backend)


def key_head_repeats(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How many times key heads are laid side by side so that each of `size` ranks gets the ones its query heads read, and no more.

    A rank has h = H / S query heads in a row; G = H / K in a row read one key head. Runs of gcd(G, h) lie within one rank and read one
    key head, so there is a copy for each of them. With K a multiple of S that is one copy, with S a multiple of K they are S / K.
    """
    group = num_heads // num_kv_heads
    return group // math.gcd(group, num_heads // size)
