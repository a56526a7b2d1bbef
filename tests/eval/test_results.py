"""eval.json: entries by step and weights, joined by suite, forgotten behind a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmctx.errors import DataError
from mmctx.eval import headlines
from mmctx.eval.results import RESULTS_FILE, add_results, drop_later, read_results


def entry(step: int, weights: str = "trained", **suites: object) -> dict[str, object]:
    return {"step": step, "weights": weights, "skipped": {}, **suites}


def test_entries_stand_in_order_and_join_by_suite(tmp_path: Path) -> None:
    assert read_results(tmp_path) == []
    add_results(tmp_path, entry(20, loss={"a": 1.0}))
    add_results(tmp_path, entry(10, loss={"a": 2.0}))
    add_results(tmp_path, entry(20, weights="ema", loss={"a": 0.5}))
    joined = add_results(tmp_path, entry(20, loss={"b": 3.0}, masked_lm={"n": 4}))
    assert joined["loss"] == {"b": 3.0}  # run again: the newer results alone
    found = read_results(tmp_path)
    assert [(e["step"], e["weights"]) for e in found] == [(10, "trained"), (20, "ema"), (20, "trained")]
    assert found[-1] == joined
    drop_later(tmp_path, 10)
    assert [e["step"] for e in read_results(tmp_path)] == [10]


def test_the_file_is_json_for_everybody(tmp_path: Path) -> None:
    add_results(tmp_path, entry(1, loss={"a": float("nan"), "b": [0.123456789, float("inf")]}))
    written = json.loads((tmp_path / RESULTS_FILE).read_text(), parse_constant=pytest.fail)
    assert written["evaluations"][0]["loss"] == {"a": None, "b": [0.123457, None]}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_text('{"evalua')
    with pytest.raises(DataError, match=r"eval\.json: cannot be read .* delete it"):
        read_results(tmp_path)


def test_headlines_are_the_finite_numbers_near_the_top() -> None:
    loss = {"captioning": {"held_out": 2.5, "n": 70}, "rare": {"held_out": float("nan"), "n": 1}}
    lengths = {"128": {"all": {"exact": 0.5, "low": 0.4}, "depths": {"0-1": {"exact": 0.5}}}}
    found = headlines({"loss": loss, "recall": {"lengths": lengths}, "step": 3, "retrieval": {}})
    assert found == {"loss": {"captioning/held_out": 2.5}, "recall": {"128": 0.5}}
