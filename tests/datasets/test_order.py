"""Orders in closed form: bijections, exactly once an epoch, weights kept."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.datasets.planning.order import BlockOrder, Mixture, permute


@given(size=st.integers(1, 5000), key=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection_for_any_size(size: int, key: int) -> None:
    found = permute(np.arange(size), size, key)
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_permutation_works_on_single_positions_of_a_huge_range() -> None:
    size = 10**12 + 7
    positions = np.array([0, 1, size // 2, size - 1])
    together = permute(positions, size, 5)
    assert len(set(together.tolist())) == 4
    assert (together < size).all()
    np.testing.assert_array_equal([permute(p[None], size, 5)[0] for p in positions], together)


def test_permutation_looks_random() -> None:
    found = permute(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(np.arange(10_000), found)[0, 1]) < 0.03
    assert (np.diff(found) == 1).mean() < 0.001
    assert (found == permute(np.arange(10_000), 10_000, 2)).mean() < 0.002


@given(size=st.integers(1, 3000), block=st.integers(1, 50), flight=st.integers(1, 20), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_sample_once(size: int, block: int, flight: int, epoch: int) -> None:
    order = BlockOrder(size, block, flight, key=3)
    found = order.ordinal(np.arange(size), np.full(size, epoch))
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_epochs_differ_and_reading_stays_among_blocks_in_flight() -> None:
    order = BlockOrder(10_000, block_size=10, in_flight=5, key=3)
    first, second = (order.ordinal(np.arange(10_000), np.full(10_000, epoch)) for epoch in (0, 1))
    assert (first == second).mean() < 0.01
    assert len(np.unique(first[:50] // 10)) == 5  # fifty samples in a row come from five blocks


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_mixture_keeps_weights_and_counts(weights: list[float]) -> None:
    mixture = Mixture(weights)
    positions = np.arange(3 * Mixture.CYCLE)
    source, number = mixture.draw(positions)
    share = np.bincount(source, minlength=len(weights)) / len(positions)
    np.testing.assert_allclose(share, np.array(weights) / sum(weights), atol=2 * len(weights) / Mixture.CYCLE)
    for s in range(len(weights)):  # each source is read in order, without gaps
        np.testing.assert_array_equal(number[source == s], np.arange((source == s).sum()))


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), positions=st.integers(0, 20_000))
@settings(max_examples=50, deadline=None)
def test_mixture_counts_draws_in_closed_form(weights: list[float], positions: int) -> None:
    mixture = Mixture(weights)
    source, _ = mixture.draw(np.arange(positions))
    np.testing.assert_array_equal(mixture.count(positions), np.bincount(source, minlength=len(weights)))
