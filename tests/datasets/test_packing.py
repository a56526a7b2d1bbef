"""Packing: nothing lost, limits kept, costs even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.datasets.planning.packing import alike, best_fit, deal, even_fit


@given(sizes=st.lists(st.integers(1, 100), max_size=80), capacity=st.integers(100, 300))
@settings(max_examples=80, deadline=None)
def test_best_fit_loses_nothing_and_keeps_the_capacity(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    assert len(bins) == len(sizes)
    loads = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert (loads <= capacity).all()
    assert (loads > 0).all()
    assert (np.sort(loads)[:2].sum() > capacity) or len(loads) < 2  # no two bins could be one


items = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5), st.integers(0, 40)), max_size=120)


@given(items=items, num_bins=st.integers(1, 8), step=st.integers(1, 4), room=st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_even_fit_places_every_item_and_never_breaks_a_limit(items, num_bins: int, step: int, room: int) -> None:
    sizes = np.array(items, np.int64).reshape(-1, 3)
    limits = [60 + room, 5 + room // 20, 40 + room]
    bins, used = even_fit(sizes[:, 0] ** 2 + 1, sizes, limits, num_bins, step)
    assert len(bins) == len(items)
    assert used >= num_bins
    assert (used - num_bins) % step == 0
    for column, limit in enumerate(limits):
        loads = np.bincount(bins, weights=sizes[:, column], minlength=used) if items else np.zeros(used)
        assert len(loads) == used
        assert loads.max() <= limit


def test_an_item_beyond_a_limit_is_named() -> None:
    with pytest.raises(ValueError, match=r"item 1 of sizes \[3, 9\] breaks the limits \[10, 8\]"):
        even_fit(np.array([1, 1]), np.array([[3, 8], [3, 9]]), [10, 8], 1)


def lognormal_documents(count: int, seed: int) -> np.ndarray:
    """Lengths as in the article's corpora: lognormal(5.5, 0.9), clipped to 16..2048."""
    return np.clip(np.random.default_rng(seed).lognormal(5.5, 0.9, count), 16, 2048).astype(np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_bins_fill_to_the_brim_and_cost_the_same(seed: int) -> None:
    lengths = lognormal_documents(2800, seed)
    costs = 4000 * lengths + lengths**2  # attention is a fifth of the work of the longest
    num_bins = -(-int(lengths.sum()) // 4096)
    bins, used = even_fit(costs, lengths[:, None], [4096], num_bins)
    assert lengths.sum() / (used * 4096) > 0.99
    work = np.bincount(bins, weights=costs, minlength=used)
    groups = work[alike(work, used)[0][: used // 8 * 8]].reshape(-1, 8)
    assert (groups.max(axis=1) / groups.mean(axis=1)).max() < 1.05


def test_even_fit_mixes_long_and_short() -> None:
    lengths = np.array([1000] * 20 + [50] * 400)
    bins, used = even_fit(lengths, lengths[:, None], [4096], 10)
    assert used == 10
    assert all((lengths[bins == number] == 1000).sum() == 2 for number in range(10))


def test_alike_groups_like_costs() -> None:
    assert alike(np.array([5, 1, 4, 2]), 2).tolist() == [[0, 2], [3, 1]]


def test_deal_shares_cost_evenly() -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 128)
    hands = costs[deal(costs, 16)].sum(axis=1)
    assert hands.max() / hands.mean() < 1.1
    assert sorted(deal(costs, 16).ravel().tolist()) == list(range(128))
