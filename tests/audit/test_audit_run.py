"""The audit of a whole run: from the command line, from Python, and before training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmctx import api
from mmctx.attention import BACKENDS
from mmctx.config import build_config
from mmctx.errors import ConfigError, LeakError
from mmctx.jsonl import read_lines
from mmctx.train.audit import cut, open_run
from mmctx.train.config import RunConfig
from mmctx.train.loop import train


def build(tree: dict[str, Any], name: str, **train_keys: Any) -> RunConfig:
    tree = copy.deepcopy(tree)
    tree["run"]["name"] = name
    tree["train"] |= train_keys
    tree["eval"]["sources"] = {}
    return build_config(RunConfig, tree, "tree")


def write(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def leak_in_attention(monkeypatch: pytest.MonkeyPatch, tree: dict[str, Any]) -> None:
    monkeypatch.setitem(BACKENDS, "no_mask", planted.backend(planted.no_mask))
    tree["model"]["transformer"]["attention"] = "no_mask"


@pytest.mark.slow
def test_a_run_and_its_checkpoint_are_audited(tree: dict[str, Any], tmp_path: Path) -> None:
    path = write(tree, tmp_path / "tiny.yaml")
    stages: list[tuple[str, int, int]] = []
    report = api.audit(path, tokens=150, progress=lambda *stage: stages.append(stage))
    assert report.ok
    assert {place for place, *_ in stages} == {str(row.mode) for row in report.rows.values() if row.mode}
    assert all(done <= total for _, done, total in stages)
    run_dir = train(build(tree, "trained", steps=1)).run_dir
    before = load_file(run_dir / "latest" / "model.safetensors")
    assert api.audit(run_dir, step=2, tokens=150).ok
    after = load_file(run_dir / "latest" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="give the YAML file"):
        api.audit(run_dir, ["model.transformer.windows=[4]"])
    with pytest.raises(ConfigError, match="counts from 1"):
        api.audit(path, step=0)


@pytest.mark.slow
def test_command_line(tree: dict[str, Any], tmp_path: Path) -> None:
    path = write(tree, tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "mmctx.cli", "audit", str(path), "--tokens", "120", "train.num_threads=1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["checks"] > 100
    assert answer["leaks"] == answer["blind"] == []
    # within a window of one token, no token sees another: nothing could be found
    done = subprocess.run([*command, "model.transformer.windows=[1]"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "blind" in done.stdout


@pytest.mark.slow
def test_training_goes_on_as_if_it_had_not_been_audited(tree: dict[str, Any]) -> None:
    """With dropout, over a resumption."""
    for name, audit in (("with", True), ("without", False)):
        train(build(tree, name, steps=2, save_every=2, audit=audit))
        train(build(tree, name, steps=4, save_every=2, audit=audit))
    runs = [Path(tree["run"]["dir"]) / name for name in ("with", "without")]
    lines = [read_lines(run / "metrics.jsonl") for run in runs]
    keys = [key for key in lines[0][0] if key.startswith("loss") or key in ("grad_norm", "batch_fingerprint")]
    assert [[line[key] for key in keys] for line in lines[0]] == [[line[key] for key in keys] for line in lines[1]]
    weights = [load_file(run / "latest" / "model.safetensors") for run in runs]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_each_stage_is_audited_as_it_is(tree: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    """Its windows too: what leaks over a border within a window shows in the stage that has one."""
    monkeypatch.setitem(BACKENDS, "window_over_border", planted.backend(planted.window_over_border))
    tree["model"]["transformer"]["attention"] = "window_over_border"
    tree["data"]["bin_tokens"] = 150
    tree["schedule"] = [{"steps": 2}, {"steps": 2, "windows": [5]}]
    tree["train"].pop("steps")
    with pytest.raises(LeakError, match="window_over_border"):
        train(build(tree, "staged", audit=True))
    written = read_lines(Path(tree["run"]["dir"]) / "staged" / "metrics.jsonl")
    assert max(line["step"] for line in written if "loss" in line) == 2
    path = write(tree, tmp_path / "staged.yaml")
    for step, window in ((2, None), (3, 5)):
        model, config, _, plan = open_run(path, [], step)
        assert [block.attention.window for block in model.trunk.blocks] == [window] * 2
        assert config.model.transformer.windows == (window,)
        assert plan.step(step - 1)


@pytest.mark.slow
def test_training_stops_on_a_leak(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    leak_in_attention(monkeypatch, tree)
    tree["data"]["bin_tokens"] = 150
    with pytest.raises(LeakError, match=r"not kept apart(?s:.*)token of .*triple\d+"):
        train(build(tree, "leaky", steps=2, audit=True))
    assert not read_lines(Path(tree["run"]["dir"]) / "leaky" / "metrics.jsonl")
    assert train(build(tree, "leaky", steps=1)).step == 1  # unless nobody asks


def test_cut_keeps_long_and_short_samples_of_each_source() -> None:
    class Sized:
        def __init__(self, length: int) -> None:
            self.input_ids = range(length)

    samples: Any = [(source, [Sized(n)]) for source, n in ((0, 30), (0, 10), (1, 90), (0, 60), (1, 50), (0, 20))]
    lengths = [len(documents[0].input_ids) for _, documents in cut(samples, 130)]
    assert lengths == [10, 60, 50]  # the longest up to half, the shortest of source 0 and of source 1
    assert cut(samples, 0) == samples
    assert len(cut(samples, 1)) == 2
