"""Packing as pure functions on integers: sizes in, bin numbers out."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np


def best_fit(sizes: Sequence[int], capacity: int, num_bins: int | None = None) -> np.ndarray | None:
    """Best fit decreasing: every item goes into the fullest bin that still has room.

    Args:
        sizes: tokens of each item.
        capacity: tokens a bin holds; an item larger than it gets a bin of its own.
        num_bins: bins at most; None for as many as it takes.

    Returns:
        (n,) int64 bin of each item, numbered from 0, or None if `num_bins` are too few.
    """
    if not len(sizes):
        return np.empty(0, dtype=np.int64)
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-np.asarray(sizes), kind="stable")
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    opened = 0
    for item in order.tolist():
        size = int(sizes[item])
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, chosen = room.pop(at)
        else:
            if opened == num_bins:
                return None
            left, chosen = capacity, opened
            opened += 1
        bins[item] = chosen
        insort(room, (left - size, chosen))
    return bins


def even_fit(sizes: Sequence[int], num_bins: int, capacity: int) -> tuple[np.ndarray, int]:
    """Packs items into at most `num_bins` bins, evenly and well mixed.

    Largest first into the emptiest bin (LPT, Graham 1969): every bin gets long and short items alike, as training wants it. Only where that
    goes beyond `capacity` does best fit pack tighter, at the price of bins of similar items: its capacity starts at the even share and
    grows by one percent until it succeeds (MULTIFIT, Coffman, Garey, Johnson 1978, searched from below).

    Returns:
        the bin of each item (n,), and the tokens of the fullest bin.
    """
    bins = _emptiest_first(sizes, num_bins)
    fullest = int(np.bincount(bins, weights=sizes).max())
    if fullest <= capacity:
        return bins, fullest
    tried = max(int(np.max(sizes)), -(-int(np.sum(sizes)) // num_bins))
    while tried < fullest:
        tighter = best_fit(sizes, tried, num_bins)
        if tighter is not None:
            return tighter, int(np.bincount(tighter, weights=sizes).max())
        tried = max(tried + 1, int(tried * 1.01))
    return bins, fullest


def _emptiest_first(sizes: Sequence[int], num_bins: int) -> np.ndarray:
    bins = np.empty(len(sizes), dtype=np.int64)
    loads = [(0, number) for number in range(num_bins)]  # a heap
    for item in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        load, chosen = loads[0]
        bins[item] = chosen
        heapreplace(loads, (load + int(sizes[item]), chosen))
    return bins


def deal(costs: np.ndarray, num_hands: int) -> np.ndarray:
    """Deals items to hands of equal size so that costs are even: (hands, items a hand) int64 item numbers.

    Round by round, dearest items first, the lightest hand takes the dearest of the round.
    """
    rounds = np.argsort(-costs, kind="stable").reshape(-1, num_hands)
    hands, loads = np.empty((num_hands, len(rounds)), dtype=np.int64), np.zeros(num_hands)
    for number, items in enumerate(rounds):
        lightest = np.argsort(loads, kind="stable")
        hands[lightest, number] = items
        loads[lightest] += costs[items]
    return hands
