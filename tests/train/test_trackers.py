"""What a line of metrics says of a run's devices and modalities, and W&B, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmctx.config import build_config
from mmctx.jsonl import read_lines
from mmctx.train.config import RunConfig, TrainConfig
from mmctx.train.loop import train
from mmctx.train.utilisation import PEAK_TFLOPS, peak_flops, peak_memory

pytestmark = pytest.mark.slow


def build(tree: dict[str, Any], name: str, **train_keys: Any) -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["train"] |= train_keys
    return build_config(RunConfig, tree, "tree")


def test_a_line_counts_tokens_by_modality_and_what_the_device_does(tree: dict[str, Any]) -> None:
    lines = read_lines(train(build(tree, "line", steps=2, peak_tflops=0.5)).run_dir / "metrics.jsonl")
    for line in lines:
        assert line["tokens"] == sum(line[f"tokens/{kind}"] for kind in ("text", "image", "audio"))
        assert line["mfu"] == pytest.approx(line["flops_per_s"] / 0.5e12)
        assert line["flops_per_s"] > 1e6
        assert line["peak_memory"] > 50e6
        assert line["skipped_steps"] == 0
    assert lines[1]["tokens/image"] > lines[0]["tokens/image"] > 0
    lines = read_lines(train(build(tree, "unknown", steps=1)).run_dir / "metrics.jsonl")
    assert lines[0]["mfu"] is None  # nobody knows what this processor can do


def test_peaks_are_looked_up_by_the_devices_full_name(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert peak_flops(gpu, "bf16", None) == 989.4e12
    assert peak_flops(gpu, "fp32", None) == pytest.approx(66.9e12)
    assert peak_flops(gpu, "bf16", 100.0) == 100e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 of tomorrow")
    assert peak_flops(gpu, "bf16", None) is None
    precisions = set(TrainConfig.model_fields["precision"].annotation.__args__)  # type: ignore[union-attr]
    assert all(peaks.keys() == precisions for peaks in PEAK_TFLOPS.values())


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 << 20)  # 256 MiB
    assert peak_memory(torch.device("cpu")) >= before
    assert peak_memory(torch.device("cpu")) > held.nbytes


def records(path: Path) -> Iterator[bytes]:
    """Of W&B's offline log: LevelDB's format (blocks of 32 KiB; checksum, length, kind, bytes) behind a header of 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole = (b"" if kind in (1, 2) else whole) + data[
            place + 7 : place + 7 + length
        ]  # whole or first; middle, last
        place += 7 + length
        if kind in (1, 4):
            yield whole


def test_wandb_gets_the_lines_offline_and_goes_on_with_its_run(tree: dict[str, Any], monkeypatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 4):
        run_dir = train(build(tree, "wandb", steps=steps, save_every=1, trackers=["wandb"])).run_dir
        shutil.rmtree(run_dir / "checkpoint-2", ignore_errors=True)  # the first sitting is set back to step 1
    logs = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in logs} == {"run-" + (run_dir / "wandb" / "run-id.txt").read_text()}
    seen: dict[int, float] = {}
    for data in (record for path in logs for record in records(path)):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            seen[record.history.step.num] = items["loss"]
    assert seen == {line["step"]: line["loss"] for line in read_lines(run_dir / "metrics.jsonl")}
