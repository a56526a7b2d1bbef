"""Exact search for the keys of a document's past that are most like each query: tiled, so that no matrix of scores is ever whole.

Arithmetic grows with the pairs of a query and a key in its memory, memory with the queries times k.

Shapes: K key heads, G query heads of each, L queries, S keys, d head width, k keys found.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.errors import MmctxError

QUERIES = 128
"""Queries of a tile."""
KEYS = 4096
"""Keys of a tile."""
_BLOCK = 16  # keys whose maximum stands for them at first: the k best keys lie in the k best blocks


def search(q: Tensor, k: Tensor, *, first: int, window: int, tokens: int, top_k: int, engine: str = "torch") -> Tensor:
    """Which keys beyond the window have the largest products with each query.

    The query with number i stands at key `first + i`; it may find keys at distances `window <= distance < window + tokens`.

    Args:
        q: (K, G, L, d).
        k: (K, S, d).
        first: place of the first query among the keys.
        window: nearer keys are not searched.
        tokens: nor are keys further away than so many behind the window.
        top_k: keys of each query and head.
        engine: "torch" or "faiss"; both are exact.

    Returns:
        (K, G, L, k) int32 numbers of keys in no order, -1 where there are no more; k is `top_k` or what the last query may find.
    """
    length = q.shape[2]
    count = max(min(top_k, tokens, first + length - window), 0)
    found = torch.full((*q.shape[:3], count), -1, dtype=torch.int32, device=q.device)
    if not count:
        return found
    ask = _Faiss(q, k, count) if engine == "faiss" else _Torch(q, k, count)
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        at = first + torch.arange(start, stop, device=q.device)[:, None]  # (n, 1)
        oldest, newest = max(first + start - window - tokens + 1, 0), first + stop - 1 - window
        if newest < 0:
            continue
        best = ask(
            start,
            stop,
            oldest,
            newest + 1,
            _Reach(at - window, tokens, first + start - window, first + stop - 1 - window),
        )
        found[:, :, start:stop] = best
    return found


class _Reach:
    """Which keys the queries of one tile may find.

    Args:
        newest: (n, 1) the newest key of each.
        tokens: how many keys up to it.
        first_newest: that of the first query, on the host.
        last_newest: that of the last.
    """

    def __init__(self, newest: Tensor, tokens: int, first_newest: int, last_newest: int) -> None:
        self.newest, self.tokens = newest, tokens
        self.common = max(last_newest - tokens + 1, 0), first_newest + 1
        """[start, stop) of the keys that all of them may find."""

    def hide(self, scores: Tensor, start: int) -> None:
        """Masks scores (..., n, m) of the keys from `start` on, in place."""
        low, high = self.common
        stop = start + scores.shape[-1]
        if low <= start and stop <= high:
            return
        keys = torch.arange(start, stop, device=scores.device)
        hidden = (keys > self.newest) | (keys <= self.newest - self.tokens)  # (n, m)
        scores.masked_fill_(hidden, -torch.inf)


class _Best:
    """The best keys so far of a tile of queries: scores and numbers, (K, G, n, up to k) each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.scores: Tensor | None = None
        self.ids: Tensor | None = None

    def add(self, scores: Tensor, ids: Tensor) -> None:
        """More candidates, (K, G, n, m) each."""
        if self.scores is not None and self.ids is not None:
            scores, ids = torch.cat([self.scores, scores], dim=-1), torch.cat([self.ids, ids], dim=-1)
        if scores.shape[-1] > self.count:
            scores, chosen = scores.topk(self.count, dim=-1, sorted=False)
            ids = ids.gather(-1, chosen)
        self.scores, self.ids = scores, ids

    def result(self) -> Tensor:
        """(K, G, n, k) int32."""
        assert self.scores is not None
        assert self.ids is not None
        ids = torch.where(self.scores > -torch.inf, self.ids, -1).to(torch.int32)
        return F.pad(ids, (0, self.count - ids.shape[-1]), value=-1)


class _Torch:
    """The reference: products of tiles, and the best of them."""

    def __init__(self, q: Tensor, k: Tensor, count: int) -> None:
        self.q, self.k, self.count = q, k, count

    def __call__(self, start: int, stop: int, oldest: int, end: int, reach: _Reach) -> Tensor:
        """(K, G, n, k) numbers of the keys in [oldest, end) that queries [start, stop) find."""
        best = _Best(self.count)
        for low in range(oldest, end, KEYS):
            best.add(*self.tile(start, stop, low, min(low + KEYS, end), reach))
        return best.result()

    def tile(self, start: int, stop: int, low: int, high: int, reach: _Reach) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the best keys in [low, high), (K, G, n, up to k) each."""
        queries = _exact(self.q[:, :, start:stop])  # (K, G, n, d)
        scores = (queries.flatten(1, 2) @ _exact(self.k[:, low:high]).mT).unflatten(1, queries.shape[1:3])
        reach.hide(scores, low)
        values, ids = top(scores, min(self.count, high - low))
        return values, ids + low


class _Faiss(_Torch):
    """Keys that all queries of a tile may find are searched by faiss (Douze et al. 2024), on the host, those at the edges by `_Torch`."""

    def __init__(self, q: Tensor, k: Tensor, count: int) -> None:
        super().__init__(q, k, count)
        faiss = load_faiss()
        self.faiss, self.added = faiss, 0
        self.indexes = [faiss.IndexFlatIP(k.shape[2]) for _ in k]

    def __call__(self, start: int, stop: int, oldest: int, end: int, reach: _Reach) -> Tensor:
        low, high = reach.common
        if high - low < KEYS:  # too few to be worth a call
            return super().__call__(start, stop, oldest, end, reach)
        best = _Best(self.count)
        for first, last in ((oldest, low), (high, end)):
            if first < last:
                best.add(*self.tile(start, stop, first, last, reach))
        best.add(*self._inside(start, stop, low, high))
        return best.result()

    def _inside(self, start: int, stop: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        if high > self.added:
            fresh = self.k[:, self.added : high].float().cpu().contiguous()
            for index, keys in zip(self.indexes, fresh, strict=True):
                index.add(keys.numpy())
            self.added = high
        queries = self.q[:, :, start:stop].float().cpu().contiguous()  # (K, G, n, d)
        count = min(self.count, high - low)
        chosen = self.faiss.SearchParameters(sel=self.faiss.IDSelectorRange(low, high)) if low else None
        pairs = [
            index.search(part.flatten(0, 1).numpy(), count, params=chosen)
            for index, part in zip(self.indexes, queries, strict=True)
        ]
        shape = (*queries.shape[:3], count)
        scores, ids = (torch.stack([torch.from_numpy(pair[n]) for pair in pairs]).view(shape) for n in (0, 1))
        return scores.to(self.q.device, _exact(self.q[:, :, :0]).dtype), ids.to(self.q.device)


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (..., m) and where they are, in no order: as `topk`, which on a CPU takes several times as long.

    The largest lie in the blocks with the largest maxima, which are far fewer.
    """
    size = scores.shape[-1]
    if size <= 2 * _BLOCK * count:
        return scores.topk(count, dim=-1, sorted=False)
    if rest := -size % _BLOCK:
        scores = F.pad(scores, (0, rest), value=-torch.inf)
    blocks = scores.unflatten(-1, (-1, _BLOCK))  # (..., b, 16)
    _, chosen = blocks.amax(dim=-1).topk(count, dim=-1, sorted=False)  # (..., k)
    candidates = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, _BLOCK)).flatten(-2)  # (..., 16 k)
    values, place = candidates.topk(count, dim=-1, sorted=False)
    block = torch.div(place, _BLOCK, rounding_mode="floor")
    return values, chosen.gather(-1, block) * _BLOCK + place % _BLOCK


def _exact(x: Tensor) -> Tensor:
    """In float32 at least: products of half precision, rounded, would have many ties."""
    return x if x.dtype == torch.float64 else x.float()


@cache
def load_faiss() -> Any:
    """The package.

    Raises:
        MmctxError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise MmctxError(
            "model.transformer.memory.search=faiss: faiss is not installed: pip install 'mmctx[faiss]', or set search=torch"
        ) from None
    return faiss
