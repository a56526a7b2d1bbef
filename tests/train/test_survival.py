"""Runs that are killed, stopped, starved and left alone by their fellows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_worker
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_sequence_parallel import torchrun

from mmctx.config import build_config
from mmctx.jsonl import read_lines
from mmctx.train.checkpoints.layout import list_checkpoints, resolve_checkpoint
from mmctx.train.config import RunConfig
from mmctx.train.loop import train
from mmctx.train.stop import StopOnSignal, exit_code

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 30


@pytest.fixture
def small(tree: dict[str, Any], fast_dir: Path) -> dict[str, Any]:
    """The tiny run without sound, in memory, saved at every step."""
    tree["run"]["dir"] = str(fast_dir / "runs")
    tree["train"] |= {"steps": STEPS, "save_every": 1, "keep": {"last": 2, "every": 10}}
    tree["eval"]["sources"] = {}
    return tree


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(resolve_checkpoint(run_dir) / "model.safetensors")


def test_twenty_kills_lose_no_step_and_change_no_bit(small: dict[str, Any], tmp_path: Path) -> None:
    """Real SIGKILLs, real files, a checkpoint after every step; a third of the kills is aimed at the writing of one."""
    small["run"]["name"] = "whole"
    whole = train(build_config(RunConfig, small, "tree"))
    expected = weights(whole.run_dir)
    pace = whole.train_seconds / STEPS  # seconds of a step: 20 kills leave some of the run to be done
    small["run"]["name"] = "killed"
    path, out = tmp_path / "tree.json", tmp_path / "out.json"
    path.write_text(json.dumps(small))
    done = subprocess.run(
        [sys.executable, kill_worker.__file__, str(path), str(out), "20", str(pace)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    for kill in [*found["kills"], found["end"]]:
        assert not kill["damaged"]
        assert kill["resumed"] in (-1, kill["before"]), kill  # what a finished checkpoint held is never lost
    killed = [kill for kill in found["kills"] if kill["status"] == signal.SIGKILL]
    assert len(killed) == 20
    assert sum(bool(kill["halves"]) for kill in killed) >= 3  # the writing of checkpoints was hit
    assert len({kill["before"] for kill in killed}) >= 5  # and the run got on between the kills
    assert found["end"]["status"] == 0, found["log"]
    assert found["end"]["halves"] == []
    assert found["steps"] == list(range(1, STEPS + 1))
    final = weights(Path(small["run"]["dir"]) / "killed")
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], expected[name]) for name in expected)


def write(tree: dict[str, Any], path: Path, name: str, **train_keys: Any) -> Path:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["train"] |= train_keys
    path.write_text(yaml.safe_dump(tree))
    return path


def until(ready: Callable[[], Any], process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0][-4000:])
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The processes of a torchrun, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        environment = child.environ()
        if "RANK" in environment and "mmctx.train" in " ".join(child.cmdline()):
            found.setdefault(int(environment["RANK"]), child)
    return found


def test_sigterm_to_a_whole_job_saves_once(small: dict[str, Any], tmp_path: Path) -> None:
    """As schedulers do: torchrun and its ranks get the signal, and torchrun hands it on to ranks that have it already."""
    keys = {"steps": 100_000, "save_every": 100_000, "distribution": {"kind": "fsdp2"}}
    process = torchrun(2, "-m", "mmctx.train", str(write(small, tmp_path / "run.yaml", "stopped", **keys)))
    run_dir = Path(small["run"]["dir"]) / "stopped"
    until(lambda: read_lines(run_dir / "metrics.jsonl"), process)
    for member in [*ranks_of(process).values(), process]:
        member.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    (checkpoint,) = list_checkpoints(run_dir)
    resolve_checkpoint(checkpoint, optimizer=True)
    assert read_lines(run_dir / "metrics.jsonl")[-1]["step"] == int(checkpoint.name.removeprefix("checkpoint-"))
    assert output.count("run the same command to go on") == 1, output[-3000:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_rank_that_dies_brings_the_others_down_with_its_traceback(
    small: dict[str, Any], tmp_path: Path, num_workers: int
) -> None:
    """One raises in the middle of a step; the other waits for it in a collective, and must not wait long. No loader process stays."""
    small["data"]["num_workers"] = num_workers
    path = write(small, tmp_path / "run.yaml", "dying", steps=100_000, save_every=2)
    worker = Path(__file__).with_name("dying_worker.py")
    began = time.monotonic()
    process = torchrun(2, str(worker), str(path))
    output, _ = process.communicate(timeout=300)
    seconds = time.monotonic() - began
    assert process.returncode == 1
    assert "RuntimeError: the cosmic ray of step 5" in output
    summary = output[output.index("Root Cause") :]
    assert "rank      : 1" in summary
    assert "the cosmic ray of step 5" in summary
    died = float(next(line for line in output.splitlines() if line.startswith("died at ")).split()[-1])
    assert time.time() - died < min(60, seconds)
    assert resolve_checkpoint(Path(small["run"]["dir"]) / "dying", optimizer=True).name == "checkpoint-4"


def test_a_second_ctrl_c_aborts_and_a_second_sigterm_does_not() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    with StopOnSignal() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.wished is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wished is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [exit_code(wish) for wish in (signal.SIGINT, signal.SIGTERM)] == [130, 143]


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(small: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]).returncode:
        pytest.skip("needs to mount a tmpfs, as root can")
    try:
        small["run"]["dir"] = str(disk)
        small["train"] |= {"steps": 6, "keep": {"last": 100}}
        path = write(small, tmp_path / "run.yaml", "full")
        command = [sys.executable, "-m", "mmctx.train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "the disk is full: the checkpoint needs" in done.stderr
        assert "Traceback" not in done.stderr
        newest = resolve_checkpoint(disk / "full", optimizer=True)
        assert not list((disk / "full").glob(".partial*"))
        for old in list_checkpoints(disk / "full")[:-1]:
            subprocess.run(["rm", "-r", str(old)], check=True)
        done = subprocess.run([*command, "train.keep.last=1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"at step {newest.name.removeprefix('checkpoint-')} of 6" in done.stderr
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
