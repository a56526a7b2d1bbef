"""The plan: exactly once, limits kept, found in any order, nothing depends on ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.datasets.config import DataConfig
from mmctx.datasets.fetch import StepSampler
from mmctx.datasets.planning.plan import Plan, Start, plan_once, share_out
from mmctx.datasets.planning.table import Units
from mmctx.datasets.shards.contents import REASONS
from mmctx.errors import ConfigError, DataError


class ArrayTable:
    """Samples of given sizes; those of no tokens cannot be used, those of a negative number fall into that many parts."""

    def __init__(self, tokens: np.ndarray, images: np.ndarray | None = None) -> None:
        self.tokens, self.num_samples = np.asarray(tokens), len(tokens)
        self.images = np.zeros(len(tokens), np.int64) if images is None else images
        self.asked = 0

    def units(self, ids: np.ndarray) -> Units:
        self.asked += len(ids)
        tokens = self.tokens[ids]
        count = np.where(tokens < 0, -tokens, (tokens > 0).astype(int))
        owner = np.repeat(np.arange(len(ids)), count)
        part = np.concatenate([np.arange(n) for n in count]).astype(int) if len(ids) else np.zeros(0, int)
        sizes = np.zeros((len(owner), 4), np.int64)
        sizes[:, 0] = np.where(tokens[owner] < 0, 100, tokens[owner])
        sizes[:, 1] = self.images[ids][owner]
        reasons = np.where(tokens == 0, REASONS.index("over_long"), 0).astype(np.uint8)
        return Units(reasons, owner, part, sizes, sizes[:, 0] * 3)


def make_config(names, weights=(None, None), **changes) -> DataConfig:
    sources = {
        name: {"shards": "x", "objectives": ["o"], "weight": weight}
        for name, weight in zip(names, weights, strict=False)
    }
    sizes = {"context_length": 2000, "bin_tokens": 4000, "bins_per_step": 4, "window_steps": 4, "block_size": 8}
    return DataConfig.model_validate({"tokenizer": "t", "sources": sources, **sizes, **changes})


def make_plan(seed: int = 0, weights: tuple[float | None, float | None] = (None, None), start=None, **changes) -> Plan:
    rng = np.random.default_rng(1)
    tables = {
        name: ArrayTable(np.clip(rng.poisson(mean, count), 1, 2000))
        for name, count, mean in (("short", 900, 60), ("long", 60, 900))
    }
    return Plan(make_config(tables, weights, **changes), tables, seed, start)


def drawn(plan: Plan, steps: range) -> list[tuple[int, int, int, int]]:
    return [sample for step in steps for bin in plan.step(step) for sample in bin.samples]


@given(
    tokens=st.lists(st.sampled_from([-3, -2, 0, *range(40, 401, 7)]), min_size=4, max_size=60).filter(
        lambda tokens: any(tokens)
    ),
    settings_=st.fixed_dictionaries(
        {
            "bins_per_step": st.integers(1, 4),
            "window_steps": st.one_of(st.none(), st.integers(1, 5)),
            "block_size": st.integers(1, 9),
            "blocks_in_flight": st.integers(1, 5),
            "bin_tokens": st.integers(400, 1500),
            "bin_images": st.integers(3, 20),
        }
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None)
@pytest.mark.slow
def test_any_plan_reads_every_sample_once_an_epoch_within_its_limits(tokens, settings_, seed: int) -> None:
    tokens = np.array(tokens)
    table = ArrayTable(tokens, images=np.arange(len(tokens)) % 4)
    plan = Plan(make_config(["s"], context_length=400, **settings_), {"s": table}, seed)
    windows = -(-2 * len(tokens) // plan.samples_per_window)
    bins = [plan.step(step) for step in range(min(windows * plan.window_steps, 400))]
    for step in bins:
        assert len(step) >= plan.config.bins_per_step
        assert len(step) % plan.config.bins_per_step == 0
        for bin in step:
            sizes = [table.units(np.array([sample])).sizes for _, sample, _, _ in bin.samples]
            assert sum(size[0, 0] for size in sizes) == bin.tokens <= plan.config.bin_tokens
            assert sum(size[0, 1] for size in sizes) <= plan.config.bin_images
    if windows * plan.window_steps > 400:
        return
    flat = [bin for step in bins for bin in step]
    counts = Counter(sample for bin in flat for sample in bin.samples)
    assert max(counts.values()) == 1
    for epoch in (0, 1):
        parts = {(sample, part) for _, sample, e, part in counts if e == epoch}
        assert parts == {(n, p) for n, t in enumerate(tokens) for p in range(-t if t < 0 else int(t > 0))}
    left_out = Counter(sample for bin in flat for _, sample, _ in bin.left_out)
    assert set(left_out) == set(np.flatnonzero(tokens == 0).tolist())


def test_a_step_is_found_without_the_steps_before_it_and_in_any_order() -> None:
    one, other = make_plan(), make_plan()
    ahead = [other.step(step) for step in (9, 3, 123_456, 3)]
    for step in range(10):
        one.step(step)
    assert ahead == [one.step(step) for step in (9, 3, 123_456, 3)]
    assert make_plan(seed=1).step(3) != one.step(3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(world_size: int) -> None:
    plan = make_plan(window_steps=2)
    steps = range(2, 300)
    ranks = [iter(StepSampler(plan, steps.start, steps.stop, rank, world_size)) for rank in range(world_size)]
    doubled = 0
    for step in steps:
        whole = plan.step(step)
        doubled += len(whole) > plan.config.bins_per_step
        shares = [share_out(whole, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        together = sorted((number, bin) for share in shares for number, bin in share)
        assert [bin for _, bin in together] == whole
        for rank, share in zip(ranks, shares, strict=True):
            assert [next(rank) for _ in share] == [bin for _, bin in share]
    assert all(next(rank, None) is None for rank in ranks)
    assert doubled  # the case of a window that draws more than usual was among them


def test_too_many_ranks_are_refused_with_both_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"bins_per_step=4 .* 3 processes; start 1 or 2 or 4 of them, or .*bins_per_step=6"
    ):
        StepSampler(make_plan(), 0, 1, 0, 3)


def lognormal(count: int) -> np.ndarray:
    return np.clip(np.random.default_rng(5).lognormal(5.5, 0.9, count), 16, 2048).astype(np.int64)


def test_windows_grow_until_bins_fill_and_ranks_are_even() -> None:
    table = ArrayTable(lognormal(60_000))
    config = make_config(["s"], context_length=4096, bin_tokens=4096, bins_per_step=8, window_steps=None)
    plan = Plan(config, {"s": table}, 0)
    steps = [plan.step(step) for step in range(3 * plan.window_steps)]
    tokens = np.array([bin.tokens for step in steps for bin in step])
    assert tokens.max() <= 4096
    assert tokens.mean() / 4096 >= 0.985
    costs = [np.array([bin.cost for bin in step]) for step in steps]
    assert max(cost.max() / cost.mean() for cost in costs) <= 1.05
    assert np.mean([len(step) > 8 for step in steps]) < 0.03  # doubled steps are rare


def test_documents_that_do_not_pack_tightly_get_a_bin_each() -> None:
    """Two of 60% do not fit into one bin, whatever their mean says."""
    config = make_config(["s"], context_length=1000, bin_tokens=1000, bins_per_step=1, window_steps=None)
    plan = Plan(config, {"s": ArrayTable(np.full(500, 600))}, 0)
    steps = [plan.step(step) for step in range(64)]
    assert {len(bin.samples) for step in steps for bin in step} <= {0, 1}
    assert np.mean([len(step) for step in steps]) < 1.1


def test_weights_set_the_share_of_samples() -> None:
    plan = make_plan(weights=(3.0, 1.0))
    samples = drawn(plan, range(64))
    assert np.mean([source == 1 for source, *_ in samples]) == pytest.approx(0.25, abs=0.01)
    counts = Counter(sample[:3] for sample in samples)
    assert max(counts.values()) == 1  # an epoch of each source is read to its end before the next begins
    epochs = Counter(epoch for source, _, epoch in counts if source == 1)
    assert [epochs[number] for number in sorted(epochs)[:-1]] == [60] * (len(epochs) - 1)


def test_weights_may_be_shares_of_tokens() -> None:
    plan = make_plan(weights=(1.0, 1.0), weight_by="tokens", window_steps=64)
    tokens = np.zeros(2)
    for source, sample, _, _ in drawn(plan, range(64)):
        tokens[source] += plan.tables[source].tokens[sample]
    assert tokens[0] / tokens.sum() == pytest.approx(0.5, abs=0.02)


def test_draws_tell_in_closed_form_what_a_window_has_taken() -> None:
    for weights, names in (((3.0, 1.0), ("short", "long")), ((None, None), ("",))):
        plan = make_plan(weights=weights)
        steps = 3 * plan.window_steps
        counts = Counter(source for source, *_ in drawn(plan, range(steps)))
        expected = {"": counts.total()} if names == ("",) else {name: counts[n] for n, name in enumerate(names)}
        assert plan.draws(steps) == plan.draws(steps - plan.window_steps + 1) == expected


def test_a_plan_takes_over_where_another_stopped() -> None:
    whole, steps = make_plan(weights=(3.0, 1.0)), 4
    start = Start(step=10, drawn=whole.draws(steps), carried=(("long", 5, 0), ("gone", 1, 0), ("short", 7, 0)))
    other = make_plan(weights=(1.0, 1.0), start=start)
    before = Counter(sample[:3] for sample in drawn(whole, range(steps)))
    after = Counter(sample[:3] for sample in drawn(other, range(10, 30)))
    first = {sample[:3] for sample in drawn(other, range(10, 10 + other.window_steps))}
    assert {(1, 5, 0), (0, 7, 0)} <= first
    assert set(before & after) <= {(1, 5, 0), (0, 7, 0)}
    with pytest.raises(IndexError, match="step 9 comes before step 10"):
        other.step(9)


def test_a_source_without_usable_samples_is_an_error() -> None:
    config = DataConfig.model_validate({"tokenizer": "t", "sources": {"s": {"shards": "a.tar", "objectives": ["o"]}}})
    with pytest.raises(DataError, match=r"data\.sources\.s.*a\.tar \(3 over_long\)"):
        Plan(config, {"s": ArrayTable(np.zeros(3, int))}, 0)


def test_a_large_source_is_looked_at_in_places() -> None:
    table = ArrayTable(lognormal(1_000_000))
    plan = Plan(make_config(["s"], context_length=4096, bin_tokens=65536, window_steps=2), {"s": table}, 0)
    assert table.asked < 20_000
    assert not plan.surveys[0].is_complete
    plan.step(10**7)
    assert float(plan.surveys[0].mean("tokens")) == pytest.approx(table.tokens.mean(), rel=0.03)


def test_plan_once_reads_everything_once() -> None:
    bins = plan_once([ArrayTable(np.array([50, 0, 60])), ArrayTable(np.array([70, -2]))], 100)
    assert sorted(s for b in bins for s in b.samples) == [
        (0, 0, 0, 0),
        (0, 2, 0, 0),
        (1, 0, 0, 0),
        (1, 1, 0, 0),
        (1, 1, 0, 1),
    ]
    assert all(b.tokens <= 100 for b in bins)


def test_a_source_goes_on_in_its_order_when_others_come_and_go() -> None:
    tables = {name: ArrayTable(np.full(60, 50)) for name in ("a", "b")}
    alone = Plan(make_config(["b"], (1.0,)), {"b": tables["b"]}, 0)
    both = Plan(make_config(["a", "b"], (1.0, 1.0)), tables, 0, Start(step=4, drawn={"b": 40}))
    group, ids, epoch = both.draw(np.arange(40))
    before, after = alone.draw(np.arange(40))[1], ids[(group == 1) & (epoch == 0)]
    assert sorted([*before, *after]) == list(range(60))
