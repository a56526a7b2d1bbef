"""A context that grows in one run: stages are exact, resumable, shown beforehand, and may be added to a finished run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_elastic import kill_after, launch

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.shards.contents import REASONS
from mmctx.errors import CheckpointError, ConfigError, DataError
from mmctx.jsonl import read_lines
from mmctx.rope import rope_frequencies
from mmctx.train.checkpoints.layout import list_checkpoints
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.train.course import build_course, forecast_run
from mmctx.train.loop import train
from mmctx.train.replay import recorded_fingerprint, replay

YARN = {"scaling": "yarn", "factor": 4.0, "original_context": 40}
STAGES: list[dict[str, Any]] = [
    {"steps": 6, "context_length": 40, "bin_tokens": 300, "sources": {"triples": 1.0}, "windows": [8, None]},
    {
        "steps": 8,
        "context_length": 80,
        "sources": {"triples": 0.6, "books": 0.4},
        "windows": [16, 30],
        "lr_factor": 0.5,
    },
    {"tokens": 4 * 2 * 600, "rope": YARN, "sources": {"books": 1.0, "triples": 0.2}},
]


@pytest.fixture
def staged(tree: dict[str, Any]) -> dict[str, Any]:
    tree["data"] |= {"block_size": 4, "blocks_in_flight": 3, "window_steps": 5}
    for source in tree["data"]["sources"].values():
        source["long_documents"] = "split"
    tree["train"] |= {"save_every": 2, "keep": {"last": 1}}
    del tree["train"]["steps"]
    tree["eval"]["sources"] = {}
    tree["schedule"] = json.loads(json.dumps(STAGES))
    return tree


def build(tree: dict[str, Any], name: str = "staged") -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    return build_config(RunConfig, tree, "run.yaml")


def logged(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line}


def switches(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run_dir / "metrics.jsonl") if "begins" in line]


def test_stages_hold_what_they_say_and_otherwise_what_the_run_says(staged: dict[str, Any]) -> None:
    config = build(staged)
    first, second, third = config.stages
    assert [(s.start, s.stop) for s in config.stages] == [(0, 6), (6, 14), (14, 18)]
    assert config.steps == 18
    assert first.config.data.context_length == 40
    assert third.config.data.context_length == staged["data"]["context_length"]
    assert list(first.config.data.sources) == ["triples"]
    assert second.config.data.sources["books"].weight == 0.4
    assert (first.config.model.transformer.windows, third.config.model.transformer.windows) == ((8, None), (None,))
    assert third.config.model.transformer.rope.base == config.model.transformer.rope.base  # only what the stage names
    assert build_config(RunConfig, config.model_dump(mode="json"), "dumped") == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 3, "tokens": 5}, ["schedule.1", "steps=3", "tokens=5"]),
        ({"context_length": 50}, ["schedule.1", "steps=None"]),
        ({"steps": 3, "sources": {"bookz": 1.0}}, ["schedule.1.sources", "'bookz'", "'books'"]),
        ({"steps": 3, "context_length": 5000}, ["schedule.1", "bin_tokens 600", "context_length 5000"]),
        ({"steps": 3, "rope": {"fctor": 2}}, ["schedule.1", "rope.fctor", "'factor'"]),
        ({"steps": 3, "windows": []}, ["schedule.1.windows"]),
        ({"steps": 3, "window": [4]}, ["schedule.1.window", "'windows'"]),
        ({"steps": 3, "lr_factor": 0}, ["schedule.1.lr_factor"]),
    ],
)
def test_a_wrong_stage_is_named(staged: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    staged["schedule"][1] = change
    with pytest.raises(ConfigError) as error:
        build(staged)
    assert all(word in str(error.value) for word in words), error.value


def test_the_length_of_a_run_is_said_once(staged: dict[str, Any]) -> None:
    staged["train"]["steps"] = 5
    with pytest.raises(ConfigError, match=r"train\.steps=5 and a schedule of 18 steps"):
        build(staged)


def test_a_later_stage_without_data_is_found_before_the_first_step(staged: dict[str, Any]) -> None:
    staged["schedule"][2] |= {"context_length": 3}
    for source in staged["data"]["sources"].values():
        source["long_documents"] = "drop"
    with pytest.raises(DataError, match=r"schedule\.2: data\.sources\.\w+: no usable sample"):
        build_course(build(staged), 0, 1)
    staged["schedule"][2] |= {"context_length": 100, "bins_per_step": 3}
    with pytest.raises(ConfigError, match=r"schedule\.2: data\.bins_per_step=3 cannot be shared out .* 2 processes"):
        build_course(build(staged), 0, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_the_second_stage_and_resumed_is_the_same_run(staged: dict[str, Any], tmp_path: Path) -> None:
    whole = train(build(staged, "whole")).run_dir
    run_dir = tmp_path / "runs" / "killed"
    at = kill_after(launch(staged, tmp_path, "killed", ranks=1, workers=0), run_dir, 8)
    assert 8 <= at < 14, "killed too late to show anything"
    assert train(build(staged, "killed")).run_dir == run_dir
    before, after = logged(whole), logged(run_dir)
    assert list(before) == list(range(1, 19))
    for key in ("batch_fingerprint", "loss", "lr", "grad_norm", "stage", "segment"):
        assert [line[key] for line in before.values()] == [line[key] for line in after.values()], key
    assert switches(whole) == switches(run_dir)
    assert [(line["step"], line["stage"]) for line in switches(whole)] == [(1, 0), (7, 1), (15, 2)]
    assert switches(whole)[2]["begins"]["rope"] == {"scaling": "yarn", "factor": 4.0, "original_context": 40}
    # what each stage ended with is kept, beyond keep.last, and opens as it was trained
    assert [path.name for path in list_checkpoints(run_dir)] == [f"checkpoint-{n}" for n in (6, 14, 16, 18)]
    windows = {}
    for step, context in ((6, 40), (14, 80), (18, 128)):
        model, _, config = load_model(run_dir / f"checkpoint-{step}")
        windows[step] = [block.attention.window for block in model.trunk.blocks]
        assert config.data.context_length == context
        want, _ = rope_frequencies(config.model.transformer.rope, config.model.transformer.head_width)
        torch.testing.assert_close(model.trunk.rope.frequencies, want, rtol=0, atol=0)
    assert windows == {6: [8, None], 14: [16, 30], 18: [None, None]}
    # the plan alone knows it all
    for step in (1, 6, 7, 10, 14, 15, 18):
        assert (
            replay(run_dir, step).fingerprint
            == recorded_fingerprint(run_dir, step)
            == before[step]["batch_fingerprint"]
        )
    alone = tmp_path / "killed.yaml"
    assert replay(alone, 12).fingerprint == before[12]["batch_fingerprint"]
    forecasted = forecast_run(build(staged), "run.yaml")
    assert [stage["first_step"] for stage in forecasted["stages"]] == [1, 7, 15]
    assert forecasted["steps"] == 18
    assert forecasted["stages"][0]["sources"].keys() == {"triples"}
    tokens = [before[n]["tokens"] for n in (6, 14, 18)]
    planned = np.cumsum([stage["tokens"] for stage in forecasted["stages"]])
    assert planned == pytest.approx(tokens, rel=0.03)


@pytest.mark.slow
def test_the_learning_rate_follows_the_stage(staged: dict[str, Any]) -> None:
    staged["train"]["schedule"] = {"kind": "constant", "warmup_steps": 0}
    lines = logged(train(build(staged)).run_dir)
    assert {lines[n]["lr"] for n in range(1, 7)} == {1e-3}
    assert {lines[n]["lr"] for n in range(7, 15)} == {0.5e-3}
    assert [lines[n]["stage"] for n in (6, 7, 14, 15)] == [0, 1, 1, 2]


@pytest.mark.slow
def test_a_finished_run_is_lengthened_by_one_more_stage(staged: dict[str, Any]) -> None:
    del staged["schedule"]
    staged["train"]["steps"] = 4
    staged["data"] |= {"context_length": 40}
    run_dir = train(build(staged)).run_dir
    before = logged(run_dir)
    staged["train"]["steps"] = None
    staged["schedule"] = [{"steps": 4}, {"steps": 3, "context_length": 160, "rope": YARN}]
    assert train(build(staged)).step == 7
    after = logged(run_dir)
    assert {n: after[n] for n in before} == before
    assert list(after) == list(range(1, 8))
    assert load_model(run_dir)[0].trunk.config.rope.scaling == "yarn"
    assert replay(run_dir, 3).fingerprint == before[3]["batch_fingerprint"]


@pytest.mark.slow
def test_what_was_trained_cannot_be_rewritten_and_what_comes_can(staged: dict[str, Any]) -> None:
    staged["schedule"] = staged["schedule"][:2]
    staged["schedule"][1]["steps"] = 2
    train(build(staged))  # 6 steps, and 2
    for number, change, word in (
        (0, {"windows": [4, None]}, r"schedule\.0\.windows: \[8, None\] in the checkpoint, \[4, None\]"),
        (0, {"steps": 5}, r"schedule\.0: steps 0\.\.6 are done, asked for 0\.\.5"),
        (1, {"rope": YARN}, r"schedule\.1\.rope"),
        (1, {"lr_factor": 2.0}, r"schedule\.1\.lr_factor"),
    ):
        other = json.loads(json.dumps(staged))
        other["schedule"][number] |= change
        with pytest.raises(CheckpointError, match=word):
            train(build(other))
    staged["schedule"][1]["steps"] = 4  # the current one may become longer
    staged["schedule"].append({"steps": 1, "rope": YARN})
    assert train(build(staged)).step == 11


def test_sources_of_other_lengths_are_buckets(staged: dict[str, Any]) -> None:
    """Two sources over the same shards: every sample is read by one of them, whatever its length."""
    data, books = staged["data"], staged["data"]["sources"]["books"]
    data["sources"] = {
        "short": books | {"lengths": [1, 30], "weight": 1.0},
        "long": books | {"lengths": [31, None], "weight": 3.0},
    }
    data["context_length"] = 200
    del staged["schedule"]
    config = build(staged)
    tables = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0).tables
    units = {name: table.units(np.arange(12)) for name, table in tables.items()}
    used = {name: set(np.flatnonzero(found.reasons == 0).tolist()) for name, found in units.items()}
    assert used["short"] | used["long"] == set(range(12))
    assert not used["short"] & used["long"]
    assert min(map(len, used.values())) >= 2
    assert units["short"].sizes[:, 0].max() <= 2 * 30  # captioning and masked LM
    assert "lengths is [1, 30]" in tables["short"].explain(min(used["long"]), REASONS.index("other_length"))


@pytest.mark.slow
def test_samples_of_other_buckets_are_counted_and_not_listed(staged: dict[str, Any]) -> None:
    staged["data"]["sources"]["books"]["lengths"] = [31, None]
    staged["data"]["context_length"] = 200
    staged["schedule"] = [{"steps": 6}]
    run_dir = train(build(staged)).run_dir
    assert logged(run_dir)[6]["left_out/other_length"] > 0
    assert Counter(line["reason"] for line in read_lines(run_dir / "skips.jsonl"))["other_length"] == 0
