"""Order, packing and plan: bijections, exactly once, limits kept, nothing depends on ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.datasets.config import DataConfig
from mmctx.datasets.fetch import StepSampler
from mmctx.datasets.order import BlockOrder, Mixture, permute
from mmctx.datasets.packing import best_fit, deal, even_fit
from mmctx.datasets.plan import FILL, SLACK, Plan, SampleTable, plan_once
from mmctx.errors import ConfigError, DataError


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


@given(sizes=st.lists(st.integers(1, 100), max_size=80), capacity=st.integers(100, 300))
@settings(max_examples=80, deadline=None)
def test_best_fit_loses_nothing_and_keeps_the_capacity(sizes: list[int], capacity: int) -> None:
    bins = best_fit(sizes, capacity)
    assert bins is not None
    assert len(bins) == len(sizes)
    loads = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert (loads <= capacity).all()
    assert (loads > 0).all()
    assert (np.sort(loads)[:2].sum() > capacity) or len(loads) < 2  # no two bins could be one


@given(sizes=st.lists(st.integers(1, 60), min_size=40, max_size=120), num_bins=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_even_fit_is_even(sizes: list[int], num_bins: int) -> None:
    bins, capacity = even_fit(sizes, num_bins, 10**9)
    assert bins.max() < num_bins
    loads = np.bincount(bins, weights=sizes, minlength=num_bins)
    assert loads.max() <= capacity
    assert capacity <= max(max(sizes), 1.15 * sum(sizes) / num_bins + 1)


def test_even_fit_packs_tighter_where_emptiest_first_does_not_fit() -> None:
    sizes = [3, 3, 2, 2, 2]  # emptiest first makes 7 and 5
    assert even_fit(sizes, 2, capacity=7)[1] == 7
    bins, fullest = even_fit(sizes, 2, capacity=6)
    assert fullest == 6
    assert np.bincount(bins, weights=sizes).tolist() == [6, 6]


def test_best_fit_says_when_bins_are_too_few() -> None:
    assert best_fit([6, 6, 6], 10, num_bins=2) is None


def test_deal_shares_cost_evenly() -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 128)
    hands = costs[deal(costs, 16)].sum(axis=1)
    assert hands.max() / hands.mean() < 1.1
    assert sorted(deal(costs, 16).ravel().tolist()) == list(range(128))


def make_plan(seed: int = 0, weights: tuple[float | None, float | None] = (None, None), **changes) -> Plan:
    rng = np.random.default_rng(1)
    tables = {}
    for name, count, mean in (("short", 900, 60), ("long", 60, 900)):
        tokens = np.clip(rng.poisson(mean, count), 1, 2000)
        tables[name] = SampleTable(np.arange(count) * 2, tokens, tokens.astype(float))
    sources = {
        name: {"shards": "x", "objectives": ["o"], "weight": weight}
        for name, weight in zip(tables, weights, strict=True)
    }
    settings = {"context_length": 2000, "bin_tokens": 4000, "bins_per_step": 4, "window_steps": 4, "block_size": 8}
    config = DataConfig.model_validate({"tokenizer": "t", "sources": sources, **settings, **changes})
    return Plan(config, tables, seed)


def drawn(plan: Plan, steps: range) -> list[tuple[int, int, int]]:
    return [sample for step in steps for bin in plan.step(step) for sample in bin.samples]


def test_every_sample_comes_once_an_epoch() -> None:
    plan = make_plan()
    steps = range(-(-2 * plan.num_samples // plan.samples_per_window) * plan.config.window_steps)
    counts = Counter(drawn(plan, steps))
    assert max(counts.values()) == 1
    for epoch in (0, 1):
        assert sum(e == epoch for _, _, e in counts) == plan.num_samples


def test_a_step_is_found_without_the_steps_before_it_and_in_any_order() -> None:
    one, other = make_plan(), make_plan()
    ahead = [other.step(step) for step in (9, 3, 123_456, 3)]
    for step in range(10):
        one.step(step)
    assert ahead == [one.step(step) for step in (9, 3, 123_456, 3)]
    assert make_plan(seed=1).step(3) != one.step(3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(world_size: int) -> None:
    plan = make_plan()
    ranks = [list(StepSampler(plan, 2, 7, rank, world_size)) for rank in range(world_size)]
    per_step = plan.config.bins_per_step // world_size
    for place, step in enumerate(range(2, 7)):
        together = [bin for bins in ranks for bin in bins[place * per_step : (place + 1) * per_step]]
        assert sorted(together, key=str) == sorted(plan.step(step), key=str)


def test_too_many_ranks_are_refused_with_both_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"bins_per_step=4 .* 3 processes; start 1 or 2 or 4 of them, or .*bins_per_step=6"
    ):
        StepSampler(make_plan(), 0, 1, 0, 3)


def test_bins_keep_their_limit_and_fill() -> None:
    plan = make_plan(window_steps=16)
    tokens = np.array([bin.tokens for step in range(128) for bin in plan.step(step)])
    assert tokens.max() <= plan.config.bin_tokens * SLACK
    assert tokens.mean() / plan.config.bin_tokens == pytest.approx(FILL, abs=0.01)


def test_documents_that_do_not_pack_tightly_get_a_bin_each() -> None:
    """Two of 60% do not fit into one bin, whatever their mean says."""
    table = SampleTable(np.arange(500), np.full(500, 600), np.full(500, 600.0))
    sources = {"s": {"shards": "x", "objectives": ["o"]}}
    config = DataConfig.model_validate(
        {"tokenizer": "t", "sources": sources, "context_length": 1000, "bin_tokens": 1000}
    )
    plan = Plan(config, {"s": table}, 0)
    assert {len(bin.samples) for step in range(64) for bin in plan.step(step)} == {1}


def test_weights_set_the_share_of_samples() -> None:
    plan = make_plan(weights=(3.0, 1.0))
    samples = drawn(plan, range(64))
    assert np.mean([source == 1 for source, _, _ in samples]) == pytest.approx(0.25, abs=0.01)
    long = Counter(sample for source, sample, epoch in samples if source == 1)
    assert max(long.values()) - min(long.values()) <= 1 or len(long) < 60  # repeats are spread evenly


def test_a_source_without_usable_samples_is_an_error() -> None:
    table = SampleTable(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    config = DataConfig.model_validate({"tokenizer": "t", "sources": {"s": {"shards": "a.tar", "objectives": ["o"]}}})
    with pytest.raises(DataError, match=r"data\.sources\.s.*a\.tar"):
        Plan(config, {"s": table}, 0)


def test_plan_once_reads_everything_once() -> None:
    tables = [
        SampleTable(np.array([4, 7]), np.array([50, 60]), np.array([1.0, 2.0])),
        SampleTable(np.array([1]), np.array([70]), np.array([3.0])),
    ]
    bins = plan_once(tables, 100)
    assert sorted(s for b in bins for s in b.samples) == [(0, 4, 0), (0, 7, 0), (1, 1, 0)]
    assert all(b.tokens <= 100 for b in bins)
