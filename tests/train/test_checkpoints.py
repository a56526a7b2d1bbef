"""Checkpoints by themselves: what is whole, what is found when something is not, what stays, and that writing stalls nobody."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmctx.config import build_config
from mmctx.errors import CheckpointError
from mmctx.model import MmctxModel
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.checkpoints import write
from mmctx.train.checkpoints.layout import list_checkpoints, newest_whole, remove_partials, resolve_checkpoint
from mmctx.train.checkpoints.load import load_model, load_optimizer
from mmctx.train.checkpoints.manifest import verify
from mmctx.train.checkpoints.retention import KeepConfig, superfluous
from mmctx.train.checkpoints.saver import Saver
from mmctx.train.checkpoints.state import TrainerState, read_state
from mmctx.train.checkpoints.writer import Writer
from mmctx.train.config import RunConfig
from mmctx.train.optim import build_optimizer


class Run:
    """A tiny model and its optimizer, which moves at each step."""

    def __init__(self, tree: dict[str, Any], run_dir: Path, **keep: Any) -> None:
        tree["train"]["keep"] = keep
        self.run_dir = run_dir
        self.config = build_config(RunConfig, tree, "tree")
        self.tokenizer = TextTokenizer(self.config.data.tokenizer)
        self.model = build_model(self.config, len(self.tokenizer))
        self.optimizer = build_optimizer(self.model, self.config.train.optimizer)
        self.state = TrainerState()
        self.saver = Saver(run_dir, self.config)
        run_dir.mkdir(parents=True, exist_ok=True)

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 + self.state.step)
        self.optimizer.step()
        self.state.step += 1

    def save(self, **metrics: Any) -> None:
        self.saver.save(self.model, self.tokenizer, self.optimizer, self.state, metrics)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.fixture
def run(tree: dict[str, Any], fast_dir: Path) -> Callable[..., Run]:
    return lambda **keep: Run(tree, fast_dir / "run", **keep)


def same(model: MmctxModel, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_what_is_saved_is_the_moment_of_saving_however_slowly_it_is_written(run, monkeypatch) -> None:
    """The writer is held up until two more steps are done: the files hold the first step, bit for bit."""
    r = run()
    r.step()
    expected = r.weights()
    moments = [s["exp_avg"].clone() for s in r.optimizer.state.values()]
    go = threading.Event()
    monkeypatch.setattr(r.saver._copied, "wait", go.wait)
    r.save()
    r.step()
    r.step()
    assert list_checkpoints(r.run_dir) == []  # the steps did not wait for it
    go.set()
    r.saver.finish()
    checkpoint = resolve_checkpoint(r.run_dir, optimizer=True)
    model, _, _ = load_model(checkpoint)
    assert same(model, expected)
    assert read_state(checkpoint).step == 1
    fresh = build_optimizer(model, r.config.train.optimizer)
    load_optimizer(model, fresh, checkpoint)
    saved = {id(p): fresh.state[p]["exp_avg"] for p in model.parameters()}
    names = [name for name, _ in r.model.named_parameters()]
    ours = {id(p): name for name, p in model.named_parameters()}
    of_run = dict(zip((id(p) for p in r.optimizer.state), moments, strict=True))
    by_name = {name: of_run[id(p)] for name, p in r.model.named_parameters()}
    assert {ours[i] for i in saved} == set(names)
    assert all(torch.equal(saved[i], by_name[ours[i]]) for i in saved)


def test_the_next_save_waits_for_the_one_before_and_an_error_comes_out_once(tmp_path: Path) -> None:
    writer, order = Writer(), []
    release = threading.Event()
    writer.submit(lambda: (release.wait(), order.append("first")))
    threading.Timer(0.1, release.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]
    writer.submit(lambda: open(tmp_path / "no" / "folder", "w"))  # type: ignore[arg-type,return-value]  # noqa: SIM115
    while not writer.failed:
        pass
    with pytest.raises(FileNotFoundError):
        writer.wait()
    writer.wait()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer/optimizer/optimizer.safetensors", "config.json", "manifest.json", "COMPLETE"]
)
def test_a_flipped_byte_is_named_and_the_one_before_is_taken(run, name: str) -> None:
    r = run()
    for _ in range(2):
        r.step()
        r.save()
    r.saver.finish()
    path = r.run_dir / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        verify(path.parents[len(Path(name).parts) - 1])
    named = "manifest.json" if name == "COMPLETE" else name  # either may be the one that changed
    assert f"checkpoint-2/{named}: damaged, its sha256 is" in str(error.value)
    assert "delete" in str(error.value)
    said: list[str] = []
    assert newest_whole(r.run_dir, say=said.append) == r.run_dir / "checkpoint-1"
    assert "passed over" in said[0]
    if not name.startswith("trainer/optimizer/"):  # an evaluation does not read it
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(r.run_dir / "checkpoint-2")
    else:
        load_model(r.run_dir / "checkpoint-2")
    (r.run_dir / "checkpoint-1" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        newest_whole(r.run_dir, say=said.append)
    assert "has 5 bytes, was written with" in said[-1]


def test_a_damaged_one_is_written_again_when_the_run_gets_there(run) -> None:
    r = run(last=1)
    for _ in range(2):
        r.step()
        r.save()
    r.saver.finish()
    damaged = r.run_dir / "checkpoint-3"
    shutil.copytree(r.run_dir / "checkpoint-2", damaged)
    (damaged / "config.json").unlink()
    assert superfluous(r.run_dir, KeepConfig(last=1), now=2) == []  # a newer one does not push out a good one
    r.step()
    r.save()
    r.saver.finish()
    verify(damaged)
    assert [path.name for path in list_checkpoints(r.run_dir)] == ["checkpoint-3"]


def test_retention(run) -> None:
    r = run(last=2, every=4, best={"metric": "loss", "mode": "min", "count": 2})
    for loss in (3.0, 0.5, 2.0, 9.0, float("nan"), 1.0, None, 8.0, 9.0, 9.0):
        r.step()
        r.save(loss=loss)
    r.saver.finish()
    kept = [read_state(path).step for path in list_checkpoints(r.run_dir)]
    assert kept == [2, 4, 6, 8, 9, 10]
    assert os.readlink(r.run_dir / "latest") == "checkpoint-10"
    assert superfluous(r.run_dir, KeepConfig(last=1), now=10, ends=[2, 10]) == [
        r.run_dir / f"checkpoint-{step}" for step in (4, 6, 8)
    ]
    with pytest.raises(CheckpointError, match=r"best\.metric='loss' is no number of metrics\.jsonl; it has lr"):
        r.save(lr=1.0)


def test_a_folder_that_is_going_away_never_looks_whole(run, monkeypatch) -> None:
    r = run(last=1)
    r.step()
    r.save()
    r.saver.finish()

    rmtree = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if path.name == "checkpoint-1":
            raise KeyboardInterrupt
        rmtree(path, **options)

    r.step()
    monkeypatch.setattr(shutil, "rmtree", killed)
    r.save()
    with pytest.raises(KeyboardInterrupt):
        r.saver.finish()
    assert (r.run_dir / "checkpoint-1" / "model.safetensors").exists()
    assert [path.name for path in list_checkpoints(r.run_dir)] == ["checkpoint-2"]


def test_partials_go_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / ".partial-checkpoint-7" / "trainer").mkdir(parents=True)
    (tmp_path / "checkpoint-6").mkdir()
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]).returncode:
        pytest.skip("needs to mount a tmpfs, as root can")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", ["for nothing", "for a part"])
def test_a_full_disk_is_an_error_that_says_what_is_missing(tree, small_disk: Path, room: str, monkeypatch) -> None:
    """Found before anything is written, or, where somebody else takes the room meanwhile, in the middle of a file."""
    r = Run(tree, small_disk / "run", last=5)
    r.step()
    r.save()
    r.saver.finish()
    size = sum(path.stat().st_size for path in (r.run_dir / "checkpoint-1").rglob("*") if path.is_file())
    free = shutil.disk_usage(small_disk).free
    left = {"for nothing": size // 4, "for a part": size // 2}[room]
    (small_disk / "ballast").write_bytes(bytes(free - left))
    if room == "for a part":
        monkeypatch.setattr(write, "require_space", lambda *_: None)
    r.step()
    r.save()
    with pytest.raises(CheckpointError) as error:
        r.saver.finish()
    assert f"{r.run_dir}/checkpoint-2: the disk is full: the checkpoint needs " in str(error.value)
    needed = int(str(error.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert size * 0.9 < needed < size * 1.1
    assert not list(r.run_dir.glob(".partial*"))
    assert resolve_checkpoint(r.run_dir, optimizer=True) == r.run_dir / "checkpoint-1"
    (small_disk / "ballast").unlink()
    r.save()  # there is room again
    r.saver.finish()
    assert resolve_checkpoint(r.run_dir, optimizer=True) == r.run_dir / "checkpoint-2"


def test_a_file_that_may_not_grow_leaves_no_partial_either(run) -> None:
    """Anywhere, without root: the limit of this process' file sizes."""
    r = run()
    r.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        r.save()
        with pytest.raises(Exception, match="File too large"):
            r.saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(r.run_dir.iterdir())


def test_a_checkpoint_holds_no_pickle(run) -> None:
    r = run()
    r.step()
    r.save()
    r.saver.finish()
    kinds = {path.suffix for path in (r.run_dir / "checkpoint-1").rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".md", ".py", ""}
    assert json.loads((r.run_dir / "checkpoint-1" / "manifest.json").read_text())["step"] == 1
