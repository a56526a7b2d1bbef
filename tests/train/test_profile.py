"""`mmctx profile` on a real run: the table's rows are disjoint and add up, the trace can be read, nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import profiler

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.ranges import timed
from mmctx.train.config import RunConfig
from mmctx.train.profile import profile_run

PARTS = {
    "data",
    "image encoder",
    "audio encoder",
    "trunk: attention",
    "trunk: MLP",
    "trunk: norms",
    "loss of captioning",
    "loss of masked_lm",
    "loss of similarity",
    "backward",
    "clip",
    "optimizer",
    "ema",
    "rest of the model",
    "other",
}


@pytest.mark.slow
def test_parts_add_up_to_the_steps(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["train"] |= {"ema": {}, "activations": {"checkpoint": "full"}}
    answer = profile_run(build_config(RunConfig, tree, "tree"), 2, tmp_path / "out")
    parts = {part["part"]: part for part in answer["parts"]}
    again = {name for name in parts if name.endswith(" (again)")}
    assert parts.keys() - again == PARTS
    assert {"trunk: attention (again)", "trunk: MLP (again)", "trunk: norms (again)"} == again  # recomputed
    assert all(part["host_ms"] >= 0 for part in parts.values())
    total = sum(part["host_ms"] for part in parts.values())
    assert total == pytest.approx(answer["step_ms"], rel=0.1)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    events = json.loads(Path(answer["trace"]).read_text())["traceEvents"]
    assert sum(event["name"] == "mmctx/step" and event["ph"] == "X" for event in events) == 2
    assert not Path(tree["run"]["dir"]).exists()


def test_an_unknown_stage_is_an_error(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--stage 2: the run has 1 stages"):
        profile_run(build_config(RunConfig, tree, "tree"), 1, tmp_path, stage=2)


def test_ranges_are_nothing_without_a_profiler() -> None:
    assert not profiler._is_profiler_enabled
    assert timed("a") is timed("b")
