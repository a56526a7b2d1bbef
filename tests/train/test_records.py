"""Files of a run over kills and restarts: lines and ledgers, without a training loop."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mmctx.errors import SkipBudgetError
from mmctx.jsonl import read_lines
from mmctx.pack import Document, Skip, pack_documents
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
