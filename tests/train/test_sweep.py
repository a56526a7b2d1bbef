"""Sweeps: real runs in real processes, one SQLite file, killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mmctx.config import build_config, load_config
from mmctx.errors import ConfigError
from mmctx.jsonl import read_lines
from mmctx.train.checkpoints.layout import list_checkpoints
from mmctx.train.config import RunConfig
from mmctx.train.sweep.config import SweepConfig
from mmctx.train.sweep.space import check_keys, settings
from mmctx.train.sweep.study import sweep
from mmctx.train.sweep.trial import hold, is_held, lock_of, run_trial

optuna = pytest.importorskip("optuna")

ROOT = Path(__file__).parents[2]
LR = "train.optimizer.lr"


@pytest.fixture
def declared(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A sweep of the tiny run: text alone, a few steps."""
    tree["model"] |= {"image": None, "audio": None}
    tree["train"] |= {"steps": 6, "log_every": 1, "save_every": 2}
    tree["eval"]["sources"] = {}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return {
        "name": "search",
        "dir": str(tmp_path / "runs"),
        "config": str(tmp_path / "run.yaml"),
        "ranges": {LR: [1e-9, 3e-3]},
        "trials": 2,
    }


def build(tree: dict[str, Any]) -> SweepConfig:
    return build_config(SweepConfig, tree, "sweep.yaml")


def write(tree: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


class TestDeclaration:
    def test_the_one_that_is_shipped_holds(self) -> None:
        config = load_config(SweepConfig, ROOT / "configs/sweeps/demo.yaml")
        run = load_config(RunConfig, ROOT / config.config, config.overrides)
        check_keys(config.ranges, run.model_dump(mode="json"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ranges": {"train.optimiser.lr": [1, 2]}}, "'train.optimiser.lr' is no key"),
            ({"ranges": {"train.optimizer.rate": [1, 2]}}, "train.optimizer holds .*lr"),
            ({"ranges": {LR: {"low": 2, "high": 1}}}, "low 2 must be less than high 1"),
            ({"ranges": {LR: {"low": 0, "high": 1, "log": True}}}, "log: true needs low above 0, found 0"),
            ({"ranges": {}}, "ranges"),
            ({"metrics": "loss"}, "did you mean 'metric'"),
        ],
    )
    def test_what_cannot_be_is_said_before_anything_runs(
        self, declared: dict[str, Any], change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            sweep(build(declared | change))

    def test_whole_ranges_give_whole_numbers_and_choices_may_be_lists(self) -> None:
        from mmctx.train.sweep.space import distributions

        declared = {
            "depth": {"low": 1, "high": 4},
            "lr": {"low": 1e-4, "high": 1, "log": True},
            "windows": [[None], [2, None]],
        }
        ranges = build({"name": "x", "config": "y", "ranges": declared}).ranges
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = [settings(ranges, study.ask(distributions(ranges)).params) for _ in range(60)]
        assert {d["depth"] for d in drawn} == {1, 2, 3, 4}
        assert all(isinstance(d["depth"], int) and 1e-4 <= d["lr"] <= 1 for d in drawn)
        assert sum(d["lr"] < 1e-2 for d in drawn) > 15  # half of them: even in the logarithm
        assert {tuple(d["windows"]) for d in drawn} == {(None,), (2, None)}


@pytest.mark.slow
def test_the_better_setting_is_found_and_nothing_runs_twice(declared: dict[str, Any]) -> None:
    """The rate that changes nothing loses; a setting that cannot be is a failed trial that says why."""
    declared |= {"ranges": {LR: [1e-9, 3e-3], "model.transformer.num_heads": [2, 4, 5]}, "trials": 6, "seed": 1}
    found = sweep(build(declared))
    folder = Path(found["dir"])
    by_state = {state: [t for t in found["trials"] if t["state"] == state] for state in ("complete", "fail", "pruned")}
    assert sum(map(len, by_state.values())) == 6
    assert {t["settings"]["model.transformer.num_heads"] for t in by_state["fail"]} == {5}
    assert all("num_heads 5" in t["problem"] for t in by_state["fail"])
    assert found["best"]["value"] == min(t["value"] for t in by_state["complete"])
    for trial in by_state["complete"]:
        assert read_lines(folder / trial["folder"] / "metrics.jsonl")[-1]["loss"] == trial["value"]
        assert bool(list_checkpoints(folder / trial["folder"])) == (trial == found["best"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}
    assert sweep(build(declared)) == found
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")} == before
    with pytest.raises(ConfigError, match="give it another name"):
        sweep(build(declared | {"ranges": {LR: [1, 2]}}))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_trial_it_was_at(declared: dict[str, Any], tmp_path: Path) -> None:
    declared |= {"ranges": {LR: [3e-3]}, "trials": 1, "overrides": ["train.steps=60", "train.save_every=1"]}
    command = [sys.executable, "-m", "mmctx.cli", "sweep", str(write(declared, tmp_path / "sweep.yaml"))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    trial = tmp_path / "runs" / "search" / "trial-0000"
    deadline = time.monotonic() + 120
    while not list_checkpoints(trial) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert is_held(lock_of(trial)), "the run that was left behind still works on it"
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=30)
    assert not is_held(lock_of(trial))
    stopped_at = len(read_lines(trial / "metrics.jsonl"))
    assert 0 < stopped_at < 60
    found = sweep(build(declared))
    assert [t["state"] for t in found["trials"]] == ["complete"]
    assert found["best"]["folder"] == "trial-0000"
    assert [line["step"] for line in read_lines(trial / "metrics.jsonl")] == list(range(1, 61))
    assert len(list(trial.parent.glob("trial-*"))) == 1


@pytest.mark.slow
def test_a_hopeless_trial_is_stopped_and_a_metric_that_is_not_there_is_named(
    declared: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "trial"
    run = yaml.safe_load(Path(declared["config"]).read_text())
    run["run"] = {"dir": str(tmp_path / "runs"), "name": "trial"}
    run["train"]["steps"] = 100_000
    with hold(lock_of(folder)) as lock:
        write(run, folder / "trial.yaml")
        outcome = run_trial(folder, lock, (), "loss", lambda step, value: step >= 3)
    assert outcome.pruned
    assert 3 <= len(read_lines(folder / "metrics.jsonl")) < 100_000
    with pytest.raises(ConfigError, match="launch: 'no-such-program' cannot be started"):
        sweep(build(declared | {"launch": ["no-such-program"], "name": "third"}))
    with pytest.raises(ConfigError, match=r"no 'accuracy'; it has .*loss"):
        sweep(build(declared | {"metric": "accuracy", "name": "other"}))
