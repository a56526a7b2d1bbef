"""What a segment of a run hands to the next: every sample that was drawn is read, or written down as left out, or carried over."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan, Start
from mmctx.train.config import RunConfig
from mmctx.train.segments import unread


@pytest.mark.parametrize("policy", ["drop", "split"])
def test_a_stopped_window_hands_over_all_that_it_has_not_told_of(tree: dict[str, Any], policy: str) -> None:
    tree["data"] |= {"context_length": 17, "bin_tokens": 200, "window_steps": 5}
    for source in tree["data"]["sources"].values():
        source["long_documents"] = policy
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    plan = Plan(config.data, data.tables, config.train.seed)
    assert any(found.reasons for found in plan.surveys) == (policy == "drop")
    for step in range(15):
        first = step - step % 5
        source, ids, epochs = plan.drawn_by(step // 5)
        drawn = Counter((plan.names[s], i, e) for s, i, e in zip(*map(list, (source, ids, epochs)), strict=True))
        bins = [bin for n in range(first, step) for bin in plan.step(n)]
        read = {(plan.names[s], sample, epoch) for bin in bins for s, sample, epoch, _ in bin.samples}
        told = Counter((plan.names[s], sample) for bin in bins for s, sample, _ in bin.left_out)
        carried = unread(plan, step)
        assert len(carried) == len(set(carried))
        if step == first:
            assert carried == ()
            continue
        assert not read & set(carried)
        assert read | set(carried) <= set(drawn)
        assert Counter(sample[:2] for sample in drawn) == told + Counter(s[:2] for s in read | set(carried))
        following = Plan(config.data, data.tables, config.train.seed, Start(step, plan.draws(step), carried))
        assert {(plan.names[s], i, e) for s, i, e in zip(*following.drawn_by(0), strict=True)} >= set(
            carried[: following.samples_per_window]
        )
