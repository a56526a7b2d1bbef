"""`benchmarks/gpu.py` at toy size on any device: every section runs, and one that is cut off leaves a line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu_script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS / "sides")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


@pytest.mark.parametrize(
    "section", ["certificate", "crossover", "attention", "training", "longest", "packing", "longest_global"]
)
def test_gpu_sections_run_at_toy_size(gpu_script, section, tmp_path):
    gpu_script.run_here(section, tmp_path / "gpu.jsonl", toy=True)
    results = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert results
    assert not [result for result in results if "error" in result]
    assert {result["section"] for result in results} == {section}


def test_gpu_section_out_of_time_leaves_a_line(gpu_script, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu_script.BUDGETS, "training", 0.1)
    gpu_script.run_apart("training", tmp_path, toy=True)
    (result,) = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert result["error"] == "stopped after its 0.1 s"
    assert sum(gpu_script.BUDGETS[name] for name in gpu_script.DEFAULT) < 8 * 60
