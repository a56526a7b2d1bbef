"""Evaluation inside training: it changes nothing, and any number of ranks finds the numbers of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmctx.config import build_config
from mmctx.errors import ConfigError, MmctxError
from mmctx.eval.results import read_results
from mmctx.jsonl import read_lines
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

SUITES = ("loss", "retrieval", "caption", "masked_lm")


def in_processes(tree: dict[str, Any], folder: Path, count: int) -> Path:
    """Trains under torchrun; returns the run's folder."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run([*command, "-m", "mmctx.train", str(path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(tree["run"]["dir"]) / tree["run"]["name"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes", [{"distribution": {"kind": "ddp"}}, {"distribution": {"kind": "fsdp2"}}, {"sequence_parallel": 2}]
)
def test_two_ranks_give_exactly_the_numbers_of_one(
    tree: dict[str, Any], tmp_path: Path, processes: dict[str, Any]
) -> None:
    tree["eval"] |= {"every": 2, "loop_suites": list(SUITES)}
    # At this rate the weights stay as they are drawn: what differs could only come from the evaluation.
    tree["train"] |= {"steps": 2, "optimizer": {"lr": 1e-30}}
    tree["run"]["name"] = "one"
    train(build_config(RunConfig, tree, "tree"))
    (one,) = read_results(Path(tree["run"]["dir"]) / "one")
    tree["run"]["name"] = "two"
    tree["train"] |= processes
    (two,) = read_results(in_processes(tree, tmp_path, 2))
    assert one["retrieval"]["text_to_text1"]["n"] == one["caption"]["image_n"] == 16
    assert {name: two[name] for name in SUITES} == {name: one[name] for name in SUITES}


@pytest.mark.slow
def test_a_run_is_none_the_wiser(tree: dict[str, Any]) -> None:
    runs = Path(tree["run"]["dir"])
    tree["train"]["ema"] = {"decay": 0.5}
    train(build_config(RunConfig, tree, "tree"))
    shutil.move(runs / "tiny", runs / "without")
    tree["eval"] |= {"every": 2, "loop_suites": ["loss", "masked-lm"], "weights": "ema"}
    train(build_config(RunConfig, tree, "tree"))
    left, right = (load_file(runs / name / "checkpoint-6" / "model.safetensors") for name in ("without", "tiny"))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    lines = [line for line in read_lines(runs / "tiny" / "metrics.jsonl") if "eval/loss/captioning/held_out" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    found = read_results(runs / "tiny")
    assert [(entry["step"], entry["weights"]) for entry in found] == [(n, "ema") for n in (2, 4, 6)]
    assert len({json.dumps(entry["loss"]) for entry in found}) == 3
    held_out = found[-1]["loss"]["captioning"]["held_out"]
    assert lines[-1]["eval/loss/captioning/held_out"] == pytest.approx(held_out, rel=1e-5)


def test_an_unknown_suite_is_told_before_the_first_step(tree: dict[str, Any]) -> None:
    tree["eval"] |= {"every": 2, "loop_suites": ["los"]}
    with pytest.raises(ConfigError, match=r"eval\.loop_suites: no evaluation suite named 'los'; there are loss, "):
        train(build_config(RunConfig, tree, "tree"))


def test_evaluations_need_held_out_data(tree: dict[str, Any]) -> None:
    tree["eval"] = {"every": 2}
    with pytest.raises(ConfigError, match="names no held-out shards"):
        build_config(RunConfig, tree, "tree")


@pytest.mark.parametrize(
    ("suite", "settings", "said"),
    [
        ("zero_shot", {}, r"zero_shot needs eval\.zero_shot"),
        ("sts", {}, r"sts needs eval\.sts\.files"),
        ("sts", {"sts": {"files": {"en": "nowhere.csv"}}}, r"eval\.sts\.files: there is no file nowhere\.csv"),
        (
            "needle",
            {"needle": {"haystack": {"kind": "text", "path": "nowhere"}}},
            r"haystack\.path: 'nowhere' holds no",
        ),
    ],
)
def test_what_a_suite_lacks_is_told_before_the_first_step(
    tree: dict[str, Any], suite: str, settings: dict[str, Any], said: str
) -> None:
    tree["eval"] |= {"suites": [suite], **settings}
    with pytest.raises(MmctxError, match=said):
        train(build_config(RunConfig, tree, "tree"))
    assert not Path(tree["run"]["dir"]).exists()
