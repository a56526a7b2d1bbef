"""Tuned runs on two processes, whole and in parts, take the steps of one; what they leave goes on on one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_sequence_parallel import finish, torchrun
from test_tuning import KINDS, STEPS, base, base_tree, tuned_tree  # noqa: F401 - fixtures

from mmctx.config import build_config
from mmctx.jsonl import read_lines
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

CASES = {
    "lora": {"distribution": {"kind": "fsdp2"}},
    "adalora": {"distribution": {"kind": "ddp"}},
    "prefix": {"distribution": {"kind": "fsdp2"}},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", CASES)
def test_two_ranks_equal_one(base_tree: dict[str, Any], base: Path, tmp_path: Path, kind: str) -> None:  # noqa: F811
    def tree_of(name: str, **train: Any) -> dict[str, Any]:
        return tuned_tree(base_tree, base, name, train={"tune": KINDS[kind], **train}, run={"dir": str(tmp_path)})

    alone = train(build_config(RunConfig, tree_of("alone"), "tree")).run_dir
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree_of("two", **CASES[kind])))
    finish(torchrun(2, "-m", "mmctx.train", str(path)))
    expected, found = (read_lines(run / "metrics.jsonl") for run in (alone, tmp_path / "two"))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch_fingerprint"] == theirs["batch_fingerprint"]
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (ours["step"], key)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(run / "latest" / name) for run in (alone, tmp_path / "two"))
        assert one.keys() == two.keys()
        for tensor in one:
            torch.testing.assert_close(two[tensor], one[tensor], rtol=1e-2, atol=2e-3)
    load_model(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / f"checkpoint-{STEPS}")
    again = read_lines(train(build_config(RunConfig, tree_of("two"), "tree")).run_dir / "metrics.jsonl")
    assert again[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=2e-4)
