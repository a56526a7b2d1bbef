"""Files of a run over kills and restarts: lines and checkpoints, without a training loop."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmctx.config import build_config
from mmctx.errors import SkipBudgetError
from mmctx.jsonl import read_lines
from mmctx.pack import Document, Skip, pack_documents
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.checkpoint import TrainerState, list_checkpoints, save_checkpoint
from mmctx.train.config import RunConfig
from mmctx.train.optim import build_optimizer
from mmctx.train.records import JsonLines, SkipLedger

ODD_KEYS = ["line\u2028separator", "next\x85line", "half\udce9pair", "绿"]


def test_any_key_survives_writing_and_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "skips.jsonl"
    for sitting in (1, 2):
        lines = JsonLines(path, last_step=sitting - 1)
        lines.write({"step": sitting, "key": key} for key in ODD_KEYS)
        lines.close()
    assert [line["key"] for line in read_lines(path)] == 2 * ODD_KEYS


def test_a_restart_drops_later_lines_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    lines = JsonLines(path, last_step=2)
    lines.write([{"step": 3, "again": True}])
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_kill_while_trimming_leaves_the_whole_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before := '{"step": 1}\n{"step": 2}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, last_step=1)
    assert path.read_text() == before


def test_the_ledger_stops_a_run_beyond_its_budget(tmp_path: Path) -> None:
    ledger = SkipLedger(tmp_path / "skips.jsonl", budget=0.01, last_step=-1)
    skip = Skip(source="s", shard="bad.tar", key="k", reason="undecodable_image", detail="")
    planned = Skip(source="s", shard="long.tar", key="k", reason="over_long", detail="")
    document = Document("o", np.array([1]), np.array([-100]), causal=True)
    ledger.record([pack_documents([document], {}, [skip] * 3, left_out=[planned] * 9)], step=1)
    ledger.check(2, 100)  # of so few samples the share means nothing yet
    ledger.check(3, 300)
    with pytest.raises(SkipBudgetError, match=r"3 of 299 .*bad\.tar \(3\)\."):
        ledger.check(3, 299)
    ledger.close()
    assert [line["planned"] for line in read_lines(tmp_path / "skips.jsonl")] == [False] * 3 + [True] * 9


def test_a_saved_step_is_left_untouched_and_old_ones_lose_complete_first(
    tree: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    tree["train"]["keep_checkpoints"] = 1
    config = build_config(RunConfig, tree, "tree")
    tokenizer = TextTokenizer(config.data.tokenizer)
    model = build_model(config, len(tokenizer))
    optimizer = build_optimizer(model, config.train.optimizer)

    def save(step: int) -> Path:
        return save_checkpoint(tmp_path, config, model, tokenizer, optimizer, TrainerState(step=step))

    first = save(1)
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert save(1) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == stamps
    assert json.loads((first / "trainer" / "trainer_state.json").read_text())["step"] == 1

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(2)
    assert first.exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
