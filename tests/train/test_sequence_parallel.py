"""Sequence parallel equals one process: losses, gradients, ledgers and fingerprints, over real gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sequence_worker
import torch
from tiny import damaged

from mmctx.config import build_config, dump_config
from mmctx.jsonl import read_lines
from mmctx.parallel.mesh import Mesh
from mmctx.train.checkpoints.manifest import OPTIMIZER
from mmctx.train.checkpoints.optimizer_state import read_tensors
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

TOLERANCES = {"fp64": (1e-12, 1e-11), "fp32": (1e-6, 1e-4), "bf16": (2e-2, 1e-1)}
"""Of losses and of gradients, relative to the largest element of the tensor, or to 0.01 if that is more. In fp32 the gradient of
similarity's scale is a sum whose terms cancel: it depends on the machine's order of adding up."""


def torchrun(ranks: int, *command: str, launch: Sequence[str] = ("--standalone",)) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, f"--nproc-per-node={ranks}", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]


@pytest.mark.slow
def test_losses_and_gradients_equal_those_of_one_process(tree: dict[str, Any], tmp_path: Path) -> None:
    """Meshes of data x sequence ranks, 2x2 and 1x4, of four processes."""
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(tree))
    expected = sequence_worker.everything(tree, Mesh())
    out = tmp_path / "out.pt"
    finish(torchrun(4, sequence_worker.__file__, "cpu", str(path), str(out), "2", "4"))
    for mesh, found in torch.load(out).items():
        assert found.keys() == expected.keys()
        for case, tensors in expected.items():
            compare(found[case], tensors, TOLERANCES[case[2]], f"{mesh} {case}")


@pytest.mark.gpu
def test_nccl_equals_one_process_and_never_waits_for_the_device(tree: dict[str, Any], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices, found {torch.cuda.device_count()}")
    path, out = tmp_path / "tree.json", tmp_path / "out.pt"
    path.write_text(json.dumps(tree))
    expected = sequence_worker.everything(tree, Mesh())
    finish(torchrun(2, sequence_worker.__file__, "cuda", str(path), str(out), "2"))
    for case, tensors in torch.load(out, map_location="cpu")["1x2"].items():
        if case[2] == "fp64":  # the others use other kernels than a CPU
            compare(tensors, expected[case], (1e-10, 1e-9), str(case))


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerances: tuple, where: str) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        tolerance = tolerances[0 if name.startswith("loss/") else 1]
        worst = (found[name].double() - want.double()).abs().max()
        assert worst <= tolerance * max(float(want.abs().max()), 1e-2), f"{where} {name}: {worst} {want.abs().max()}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_under_any_mesh(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """A step at data x sequence 1x2, one at 2x2, one alone; one picture cannot be decoded. AdamW's first moment after step 1 is a tenth of
    the gradient, so checkpoints show that gradients have the right size however many ranks DDP averages over.
    """
    tree = damaged(tree, corpus, tmp_path / "corpus")
    tree["data"] |= {"skip_budget": 0.5, "bins_per_step": 4, "bin_tokens": 300}
    tree["eval"]["sources"] = {}
    tree["train"] |= {
        "save_every": 1,
        "keep": {"last": 10},
        "optimizer": {"eps": 1e-4, "clip_norm": 100.0},
        "schedule": {"kind": "constant", "warmup_steps": 0},
    }
    whole = train(config_of(tree, "whole", 3, 1)).run_dir
    for steps, size, ranks in ((1, 2, 2), (2, 2, 4)):
        path = tmp_path / f"{steps}.yaml"
        dump_config(config_of(tree, "shared", steps, size), path)
        finish(torchrun(ranks, "-m", "mmctx.train", str(path)))
    shared = train(config_of(tree, "shared", 3, 1)).run_dir
    exact = ("step", "tokens", "samples", "fill", "lr", "batch_fingerprint", "skipped", "skipped/undecodable_image")
    lines = [read_lines(run_dir / "metrics.jsonl") for run_dir in (whole, shared)]
    assert lines[0][-1]["skipped"] > 0
    for want, found in zip(*lines, strict=True):
        assert {key: found.get(key) for key in exact} == {key: want.get(key) for key in exact}
        for key in ("loss", "loss/captioning", "loss/masked_lm", "loss/similarity", "grad_norm"):
            assert found[key] == pytest.approx(want[key], rel=1e-5 if key == "grad_norm" else 1e-6), key
    ledgers = [[line for path in d.glob("skips*.jsonl") for line in read_lines(path)] for d in (whole, shared)]
    assert sorted(map(str, ledgers[0])) == sorted(map(str, ledgers[1]))
    for step in (1, 2):
        want, found = (read_tensors(run_dir / f"checkpoint-{step}" / OPTIMIZER) for run_dir in (whole, shared))
        assert any(name.endswith("/exp_avg") for name in want)
        # weights differ by roundings after step 1
        compare(found, want, (0, 1e-5 if step == 1 else 1e-4), f"step {step}")


def config_of(tree: dict[str, Any], name: str, steps: int, sequence_parallel: int) -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["train"] |= {"steps": steps, "sequence_parallel": sequence_parallel}
    return build_config(RunConfig, tree, "tree")
