"""DDP and FSDP2 equal one process, whatever a rank's batches lack; what they leave behind is read by any number of processes."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

import distribution_worker
import pytest
import torch
import yaml
from test_sequence_parallel import finish, torchrun

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.jsonl import read_lines
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.train.distribution import is_sharded
from mmctx.train.loop import train

TOLERANCE = {"fsdp2, bf16": 0.05, "fsdp2, muon": 1e-3}
"""Relative; 1e-9 where nothing else is said: everything else is in double precision. Muon's iterations are in bfloat16."""


@pytest.fixture(scope="module")
def frugal_tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tiny import tiny_tree

    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["eval"]["sources"] = {}
    tree["model"]["transformer"] |= {"dropout": 0.0, "depth": 2}  # masks of a sequence group would be other ones
    return tree


@pytest.fixture(scope="module")
def alone(frugal_tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What one process finds."""
    long = distribution_worker.losses(frugal_tree, distribution_worker.Case(200, {}))
    others = {"bf16": {"precision": "bf16"}, "muon": {"optimizer": {"kind": "muon"}}}
    short = {
        name: distribution_worker.losses(frugal_tree, distribution_worker.Case(5, others[name])) for name in others
    }
    return {
        name: short.get(name.rpartition(" ")[2], long)[: case.steps] for name, case in distribution_worker.CASES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_steps_hang_nobody_and_equal_one_process(
    frugal_tree: dict[str, Any], alone: dict[str, torch.Tensor], tmp_path: Path, ranks: int
) -> None:
    """Pictures, sound, or everything are absent from random bins of random ranks."""
    path, out = tmp_path / "tree.json", tmp_path / "out.pt"
    path.write_text(json.dumps(frugal_tree))
    finish(torchrun(ranks, distribution_worker.__file__, str(path), str(out)))
    found = torch.load(out)
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(
            found[name],
            expected,
            rtol=TOLERANCE.get(name, 1e-9),
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert alone["ddp"][-1, -1] != alone["ddp"][0, -1]


def test_what_does_not_go_together_is_refused(tree: dict[str, Any]) -> None:
    tree["train"] |= {"audit": True, "distribution": {"kind": "fsdp2"}}
    with pytest.raises(ConfigError, match="run `mmctx audit CONFIG` instead"):
        build_config(RunConfig, tree, "tree")
    tree["train"] |= {"audit": False, "optimizer": {"kind": "adafactor"}}
    with pytest.raises(ConfigError, match=r"adafactor .* fsdp2 splits; use adamw or muon"):
        build_config(RunConfig, tree, "tree")
    tree["train"]["optimizer"] = {"kind": "muon"}
    build_config(RunConfig, tree, "tree")


def one_node(ranks: int, *command: str) -> Sequence[Popen]:
    return [torchrun(ranks, *command)]


def two_nodes(ranks: int, *command: str) -> Sequence[Popen]:
    """Two agents of torchrun that find each other, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    meet = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test")
    return [torchrun(ranks // 2, *command, launch=meet) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_two_processes_saved_in_parts_one_and_four_go_on_from(frugal_tree: dict[str, Any], tmp_path: Path) -> None:
    """Four steps of FSDP2 on two processes; from the second again on one, on four, and on two that hold everything. Losses are those of
    one process.
    """
    runs, path = tmp_path / "runs", tmp_path / "run.yaml"
    tree = json.loads(json.dumps(frugal_tree))
    tree["data"] |= {"bins_per_step": 4, "bin_tokens": 300}
    tree["train"] |= {"steps": 4, "save_every": 2, "log_every": 1, "keep": {"last": 9}}
    tree["run"] = {"name": "alone", "dir": str(runs)}
    alone = read_lines(train(build_config(RunConfig, tree, "tree")).run_dir / "metrics.jsonl")

    def launch(name: str, ranks: int, kind: str, start: Callable[..., Sequence[Popen]] = one_node) -> None:
        tree["run"]["name"] = name
        tree["train"]["distribution"] = {"kind": kind}
        path.write_text(yaml.safe_dump(tree))
        for process in start(ranks, "-m", "mmctx.train", str(path)):
            finish(process)
        lines = read_lines(runs / name / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        for ours, theirs in zip(lines, alone, strict=True):
            for key in ("loss", "loss/captioning", "loss/masked_lm", "loss/similarity", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (name, ours["step"], key)

    launch("two", 2, "fsdp2")
    assert len(list((runs / "two" / "checkpoint-2" / "trainer" / "optimizer").iterdir())) == 2  # a part from each
    shutil.rmtree(runs / "two" / "checkpoint-4")
    model, _, _ = load_model(runs / "two")  # whole weights, for whoever evaluates
    assert not any(is_sharded(module) for module in model.modules())
    for name, ranks, kind, start in (
        ("one", 1, "fsdp2", one_node),
        ("four", 4, "fsdp2", one_node),
        ("whole", 2, "ddp", two_nodes),
    ):
        shutil.copytree(runs / "two", runs / name, symlinks=True)
        launch(name, ranks, kind, start)
