"""One rank's part of a packed batch, worked out on the host: its tokens, its labels, its share of the pictures and clips to encode.

Shapes: T tokens of the batch, S ranks, t tokens of a rank, I items, R rows of an encoder's output, M media slots, P pooled positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmctx.pack import MediaBatch, PackedBatch
from mmctx.parallel.exchange import LentRows, RowExchange, TokenShards


def shard_batch(batch: PackedBatch, rank: int, size: int, group: dist.ProcessGroup | None) -> PackedBatch:
    """The part of `batch` that one of `size` ranks computes.

    - Tokens, labels and positions are a run of T / S tokens, give or take one: norms, MLPs, embeddings and output heads see no others.
    - The layout stays that of all tokens: attention gathers them, for a share of the heads.
    - Items to encode are dealt evenly by their cost, whoever holds their slots; `MediaBatch.exchange` brings embeddings there.
    - Embeddings of documents are compared on one rank, the one that has most of them already; `PackedBatch.lent` brings the others.

    Each labelled position and each pair of views counts on exactly one rank, so losses and gradients of the ranks add up to those of the
    batch. Tokens, samples, skips, predictions and fingerprint are those of the whole batch: they are not to be counted from its parts.

    Args:
        batch: on the host, the same on all ranks of the group.
        rank: of this process in the group.
        size: S.
        group: the S ranks; see `RowExchange`.
    """
    cuts = cut_evenly(batch.num_tokens, size)
    start, end = int(cuts[rank]), int(cuts[rank + 1])
    shards = TokenShards(tuple(np.diff(cuts).tolist()), rank, group)
    part = replace(
        batch,
        input_ids=batch.input_ids[start:end],
        labels=batch.labels[start:end],
        position_ids=batch.position_ids[start:end],
        layout=replace(batch.layout, shards=shards),
        label_positions=_within(batch.label_positions, start, end),
        media={kind: _share_media(media, cuts, shards) for kind, media in batch.media.items()},
        **_lend(batch, cuts, shards),
    )
    return part.pin_memory() if batch.input_ids.is_pinned() else part


def cut_evenly(count: int, size: int) -> np.ndarray:
    """(S + 1,) int64 bounds of runs that differ by one at most, longer ones first."""
    return np.concatenate([[0], np.cumsum([(count + size - 1 - rank) // size for rank in range(size)])])


def share_items(costs: Sequence[int], size: int) -> np.ndarray:
    """(S + 1,) int64 bounds of the items that each rank takes: runs of even cost, give or take one item.

    Runs, because items come in the order of their slots: most are encoded where they are needed, or next door.
    """
    ends = np.cumsum(np.asarray(costs, np.int64))
    middles = 2 * ends - costs  # twice the running cost at an item's middle, which decides whose it is
    owners = middles * size // (2 * ends[-1])
    return np.searchsorted(owners, np.arange(size + 1))


def _within(positions: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Positions in `[start, end)`, counted from `start`; names without any are left out."""
    inside = {name: p[(p >= start) & (p < end)] - start for name, p in positions.items()}
    return {name: p for name, p in inside.items() if len(p)}


def _owner(places: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The rank that holds each place; ranks with nothing between their cuts hold none."""
    return np.searchsorted(cuts, places, side="right") - 1


def _exchange(
    source: np.ndarray, target: np.ndarray, shards: TokenShards
) -> tuple[np.ndarray, np.ndarray, RowExchange]:
    """From the rank that has each row and the rank that wants it: what this rank sends and what it receives, as numbers of rows, in the
    order in which they go and arrive.
    """
    sent, received = np.flatnonzero(source == shards.rank), np.flatnonzero(target == shards.rank)
    sent = sent[np.argsort(target[sent], kind="stable")]
    received = received[np.argsort(source[received], kind="stable")]
    size = len(shards.sizes)
    counts = [tuple(np.bincount(ranks, minlength=size).tolist()) for ranks in (target[sent], source[received])]
    return sent, received, RowExchange(*counts, group=shards.group)


def _share_media(media: MediaBatch, cuts: np.ndarray, shards: TokenShards) -> MediaBatch:
    """This rank's items, and the way of embeddings from who encodes them to who holds their slots."""
    items = share_items(media.num_tokens, len(shards.sizes))
    own = slice(int(items[shards.rank]), int(items[shards.rank + 1]))
    row_cuts = np.concatenate([[0], np.cumsum(media.num_tokens)])[items]
    value_cuts = np.concatenate([[0], np.cumsum(media.lengths)])[items]
    slots, rows = media.slots.numpy(), media.rows.numpy()  # (M,) each
    sent, received, exchange = _exchange(_owner(rows, row_cuts), _owner(slots, cuts), shards)
    return MediaBatch(
        values=media.values[value_cuts[shards.rank] : value_cuts[shards.rank + 1]],
        lengths=media.lengths[own],
        num_tokens=media.num_tokens[own],
        sizes=media.sizes[own],
        slots=torch.from_numpy(slots[received] - cuts[shards.rank]),
        rows=torch.from_numpy(rows[sent] - row_cuts[shards.rank]),
        exchange=exchange,
    )


def _lend(batch: PackedBatch, cuts: np.ndarray, shards: TokenShards) -> dict[str, Any]:
    """Pooled positions and pairs on the rank that compares embeddings, none elsewhere, and the rows that go there: all those that a mean is
    taken over, so that it is summed in one place and in one order.
    """
    if not batch.pooled:
        return {}
    positions = torch.cat(list(batch.pooled.values())).numpy()  # (P,)
    source = _owner(positions, cuts)
    borrower = int(np.bincount(source, minlength=len(shards.sizes)).argmax())
    sent, received, exchange = _exchange(source, np.full_like(source, borrower), shards)
    lent = LentRows(torch.from_numpy(positions[sent] - cuts[shards.rank]), exchange)
    if shards.rank != borrower:
        return {"lent": lent, "pooled": {}, "pool_sizes": {}, "pairs": {}}
    place = np.empty_like(received)
    place[received] = np.arange(len(received)) + shards.own_size  # lent rows stand behind this rank's own
    views = torch.from_numpy(place).split([len(p) for p in batch.pooled.values()])
    return {"lent": lent, "pooled": dict(zip(batch.pooled, views, strict=True))}
