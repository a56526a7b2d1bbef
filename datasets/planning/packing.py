"""Packing as pure functions on integers: sizes in, bin numbers out.

Shapes: n items, d limited quantities (tokens, pictures, frames, pairs), k bins.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace

import numpy as np

BY_COST = 0.8
"""Share of the total that is spread by cost; the small items that are left then even out how full bins are."""


def even_fit(
    costs: np.ndarray, sizes: np.ndarray, limits: Sequence[int], num_bins: int, step: int = 1
) -> tuple[np.ndarray, int]:
    """Packs items so that bins cost about the same and none goes beyond a limit.

    Dearest first into the cheapest bin that has room (LPT, Graham 1969): every bin gets long and short items alike, as training wants it.
    The small rest goes where most is free, which fills bins to the brim. Where an item finds no room, packing starts again with
    more bins.

    Args:
        costs: (n,) int64 estimated work.
        sizes: (n, d) int64, tokens first; each item alone must keep the limits.
        limits: d largest sums of a bin.
        num_bins: bins to use; some may stay empty.
        step: bins come in multiples of this beyond `num_bins`.

    Returns:
        the bin of each item (n,) int64, and the number of bins.

    Raises:
        ValueError: an item breaks a limit by itself.
    """
    if (over := sizes > np.asarray(limits)).any():
        item = int(np.flatnonzero(over.any(axis=1))[0])
        raise ValueError(f"item {item} of sizes {sizes[item].tolist()} breaks the limits {list(limits)} by itself")
    binding = sizes.sum(axis=0) > np.asarray(limits)  # a limit that all items together keep cannot be broken
    binding[0] = True
    sizes, limits = sizes[:, binding], [limit for limit, binds in zip(limits, binding, strict=True) if binds]
    needed = int((-(-sizes.sum(axis=0) // np.asarray(limits))).max(initial=0))
    num_bins += max(0, -(-(needed - num_bins) // step) * step)
    order = np.argsort(-costs, kind="stable")
    shares = ((sizes << 20) // np.asarray(limits)).sum(
        axis=1
    )  # of the limits together; integers round alike everywhere
    taken = np.cumsum(shares[order])
    dear = int(np.searchsorted(taken, BY_COST * (taken[-1] if len(taken) else 0)))
    while True:
        room = [list(limits) for _ in range(num_bins)]
        bins = np.empty(len(costs), dtype=np.int64)
        placed = _pour(order[:dear], costs, sizes, room, bins)
        if placed == dear:
            held = np.zeros(num_bins, np.int64)
            np.add.at(held, bins[order[:dear]], shares[order[:dear]])
            placed += _pour(order[dear:], shares, sizes, room, bins, held.tolist())
        if placed == len(order):
            return bins, num_bins
        # Half of what the rest would fill alone: later, smaller items may still find room between the others.
        wanted = int((sizes[order[placed:]].sum(axis=0) // (2 * np.asarray(limits))).max())
        num_bins += max(1, wanted // step) * step


def _pour(
    items: np.ndarray,
    weights: np.ndarray,
    sizes: np.ndarray,
    room: list[list[int]],
    bins: np.ndarray,
    held: Sequence[int] = (),
) -> int:
    """Puts each item, in order, where the least weight is of the bins that have room, until one finds none; returns how many were put.

    Takes from `room` and writes `bins`; `held` is the weight that each bin starts with.
    """
    weight_of, size_of = weights[items].tolist(), sizes[items].tolist()
    heap = sorted(zip(held or [0] * len(room), range(len(room)), strict=True))  # a sorted list is a heap
    for number, (item, weight, size) in enumerate(zip(items.tolist(), weight_of, size_of, strict=True)):
        passed = []
        while heap and not _fits(size, room[heap[0][1]]):
            passed.append(heappop(heap))
        if not heap:
            return number
        load, chosen = heap[0]
        heapreplace(heap, (load + weight, chosen))
        bins[item] = chosen
        left = room[chosen]
        for column, amount in enumerate(size):
            left[column] -= amount
        for entry in passed:
            heappush(heap, entry)
    return len(items)


def _fits(size: list[int], left: list[int]) -> bool:
    for amount, free in zip(size, left, strict=True):  # noqa: SIM110  `all` takes three times as long
        if amount > free:
            return False
    return True


def best_fit(sizes: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """Best fit decreasing: every item goes into the fullest bin that still has room; for sets that are read once.

    Args:
        sizes: (n,) tokens of each item.
        capacity: tokens a bin holds; an item larger than it gets a bin of its own.

    Returns:
        (n,) int64 bin of each item, numbered from 0.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    opened = 0
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[item])
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, chosen = room.pop(at)
        else:
            left, chosen = capacity, opened
            opened += 1
        bins[item] = chosen
        insort(room, (left - size, chosen))
    return bins


def alike(costs: np.ndarray, group_size: int) -> np.ndarray:
    """Groups items of like cost, the dearest first: (groups, group size) item numbers. Ranks that share such a group finish together."""
    return np.argsort(-costs, kind="stable").reshape(-1, group_size)


def deal(costs: np.ndarray, num_hands: int) -> np.ndarray:
    """Deals items to hands of equal size so that costs are even: (hands, items a hand) int64 item numbers.

    Round by round, dearest items first, the lightest hand takes the dearest of the round.
    """
    rounds = np.argsort(-costs, kind="stable").reshape(-1, num_hands)
    hands, loads = np.empty((num_hands, len(rounds)), dtype=np.int64), np.zeros(num_hands, dtype=costs.dtype)
    for number, items in enumerate(rounds):
        lightest = np.argsort(loads, kind="stable")
        hands[lightest, number] = items
        loads[lightest] += costs[items]
    return hands
