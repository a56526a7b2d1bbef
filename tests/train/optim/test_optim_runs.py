"""Optimizers, frozen modules, averages and the guard in whole runs: over restarts, stages and ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmctx import api
from mmctx.config import build_config
from mmctx.errors import CheckpointError, ConfigError, GuardError
from mmctx.jsonl import read_lines
from mmctx.train.build import build_model
from mmctx.train.checkpoints.manifest import seal
from mmctx.train.config import RunConfig
from mmctx.train.loop import train
from mmctx.train.replay import replay

pytestmark = pytest.mark.slow

ALIGN_THEN_ALL = [{"steps": 3, "modules": {"trunk": {"freeze": True}}}, {"steps": 3}]


def build(tree: dict[str, Any], name: str, **train_keys: Any) -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["train"] |= train_keys
    if "schedule" in tree:
        del tree["train"]["steps"]
    return build_config(RunConfig, tree, "tree")


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_a_restart_is_bitwise_with_everything_that_has_a_state(tree: dict[str, Any], kind: str) -> None:
    """The trunk is frozen at first; steps are left out before and after the restart, which falls between the stages' ends."""
    tree["schedule"] = ALIGN_THEN_ALL
    keys = {
        "optimizer": {"kind": kind},
        "ema": {"decay": 0.9},
        "guard": {"spike_factor": 1.02, "window": 1},
        "save_every": 2,
    }
    whole = train(build(tree, "whole", **keys)).run_dir
    halved = whole.with_name("halved")
    halved.mkdir()
    shutil.copytree(whole / "checkpoint-3", halved / "checkpoint-3")  # as a kill leaves it
    assert train(build(tree, "halved", **keys)).step == 6
    end = "checkpoint-6"
    for name in ("model.safetensors", "trainer/ema.safetensors"):
        assert_same(tensors(whole / end / name), tensors(halved / end / name))
    states = [json.loads((d / end / "trainer" / "trainer_state.json").read_text()) for d in (whole, halved)]
    assert states[0]["guard"] == states[1]["guard"]
    left_out = [line["step"] for line in read_lines(whole / "skips.jsonl") if "event" in line]
    assert left_out
    assert states[0]["guard"]["skipped"] == len(left_out) == read_lines(whole / "metrics.jsonl")[-1]["skipped_steps"]
    fresh = build_model(build(tree, "fresh"), 323).state_dict()
    frozen = tensors(whole / "checkpoint-3" / "model.safetensors")
    changed = {name.split(".")[0] for name in fresh if name in frozen and not torch.equal(fresh[name], frozen[name])}
    assert changed == {"embedding", "encoders", "objectives"}


def test_steps_left_out_name_their_batch_and_too_many_stop_the_run(tree: dict[str, Any], capfd) -> None:
    config = build(tree, "spikes", steps=12, guard={"spike_factor": 1.01, "window": 1, "max_skips": 1})
    with pytest.raises(GuardError, match=r"2 steps so far, more than train\.guard\.max_skips=1.*skips\.jsonl"):
        train(config)
    run_dir = Path(config.run.dir) / "spikes"
    events = [line for line in read_lines(run_dir / "skips.jsonl") if "event" in line]
    assert [event["reason"] for event in events] == ["spike", "spike"]
    for event in events:
        assert event["batch_fingerprint"] == replay(run_dir, event["step"]).fingerprint
        assert event["grad_norm"] > 1.01 * event["mean_grad_norm"]
    assert f"step {events[0]['step']} was left out: spike" in capfd.readouterr().err
    assert train(build(tree, "spikes", steps=12, guard={"max_skips": 9})).step == 12  # the budget may be raised


def launch(tree: dict[str, Any], tmp_path: Path) -> None:
    """Two processes over gloo."""
    tree = json.loads(json.dumps(tree))
    tree["eval"]["sources"] = {}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmctx.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-12000:]


def test_ranks_freeze_unfreeze_average_and_leave_out_alike(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["schedule"] = [
        *ALIGN_THEN_ALL[:1],
        {"steps": 2},
        {"steps": 2, "modules": {"encoders.audio": {"freeze": True}}},
    ]
    tree["train"] |= {"ema": {"decay": 0.9}, "guard": {"spike_factor": 1.001, "window": 1}}
    one = train(build(tree, "one")).run_dir
    del tree["train"]["steps"]
    tree["run"]["name"] = "two"
    launch(tree, tmp_path)
    two = one.with_name("two")
    for ours, theirs in zip(read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl"), strict=True):
        for key in {"loss", "grad_norm", "skipped_steps", "tokens/text", "tokens/image", "tokens/audio"} & ours.keys():
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
    assert read_lines(one / "metrics.jsonl")[-1]["skipped_steps"] > 0
    events = [[line for line in read_lines(d / "skips.jsonl") if "event" in line] for d in (one, two)]
    for key in ("step", "reason", "batch_fingerprint"):
        assert [event[key] for event in events[0]] == [event[key] for event in events[1]]
    for name in ("model.safetensors", "trainer/ema.safetensors"):
        a, b = (tensors(run / "latest" / name) for run in (one, two))
        for tensor in a:
            torch.testing.assert_close(a[tensor], b[tensor], rtol=1e-3, atol=1e-4)


def test_averaged_weights_are_evaluated_where_asked(tree: dict[str, Any]) -> None:
    run_dir = train(build(tree, "ema", ema={"decay": 0.5, "warmup": False})).run_dir
    trained = api.evaluate(run_dir, suites=["loss"])
    averaged = api.evaluate(run_dir, suites=["loss"], overrides=["eval.weights=ema"])
    assert (trained["weights"], averaged["weights"]) == ("trained", "ema")
    checkpoint = (run_dir / "latest").resolve()
    weights = tensors(checkpoint / "model.safetensors") | tensors(checkpoint / "trainer" / "ema.safetensors")
    (checkpoint / "model.safetensors").unlink()
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    seal(checkpoint)
    by_hand = api.evaluate(run_dir, suites=["loss"])
    losses = [{n: loss["held_out"] for n, loss in found["loss"].items()} for found in (trained, averaged, by_hand)]
    assert losses[1] == losses[2] != losses[0]
    with pytest.raises(ConfigError, match=r"eval\.weights=ema asks for averaged weights, but train\.ema is null"):
        build(tree | {"eval": {"weights": "ema"}}, "none")


def test_another_optimizer_or_average_is_another_run(tree: dict[str, Any]) -> None:
    train(build(tree, "first", steps=2))
    for change in ({"optimizer": {"kind": "muon"}}, {"ema": {}}, {"modules": {"trunk": {"lr_factor": 0.1}}}):
        with pytest.raises(CheckpointError, match=rf"train\.{min(change)}"):
            train(build(tree, "first", **({"steps": 3} | change)))
