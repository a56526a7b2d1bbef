"""A run as its folder tells it: configuration, metrics, results, skips. Nothing is trained, loaded or indexed."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmctx.errors import DataError
from mmctx.eval.results import ABOUT, read_results
from mmctx.eval.suites import headlines
from mmctx.jsonl import each_line

_SKIPS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Column:
    """One number of metrics.jsonl over steps.

    Attributes:
        steps: (n,) optimizer steps.
        values: (n,) float; may hold NaN and infinity.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder says.

    Attributes:
        name: of the run.
        settings: the resolved configuration as a plain tree; empty where there is none.
        manifest: what it was made of and with; empty where there is none.
        results: of each suite the newest, with `step`, `tokens`, `train_seconds` and `skipped` of the newest evaluation.
        steps_of: suites whose results are of an earlier step than the newest evaluation, with that step.
        evaluations: each suite's headline numbers over steps, as `SUITE/NAME`, from metrics.jsonl and eval.json.
        columns: numbers of metrics.jsonl.
        events: its other lines: stages that begin.
        skips: reasons with counts and first samples; None where there is no ledger.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    steps_of: Mapping[str, int] = field(default_factory=dict)
    evaluations: Mapping[str, Column] = field(default_factory=dict)
    columns: Mapping[str, Column] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    skips: Mapping[str, Any] | None = None

    @property
    def suites(self) -> dict[str, Any]:
        """Results by suite."""
        return {name: found for name, found in self.results.items() if name not in ABOUT}


def read_run(folder: Path, name: str | None = None, results: Mapping[str, Any] | None = None) -> Run:
    """Reads a run's folder.

    Args:
        folder: holds some of config.yaml, manifest.json, metrics.jsonl, skips*.jsonl and eval.json.
        name: how the page calls it; by default as its configuration does.
        results: one entry of eval.json to show, instead of the newest of each suite.

    Raises:
        DataError: a file is not as it was written.
    """
    settings = _tree(folder / "config.yaml")
    columns, events = _read_metrics(folder / "metrics.jsonl")
    entries = read_results(folder)
    newest, steps_of = _newest(entries) if results is None else (dict(results), {})
    evaluations = {n.removeprefix("eval/"): column for n, column in columns.items() if n.startswith("eval/")}
    return Run(
        name=name or settings.get("run", {}).get("name") or folder.resolve().name,
        settings=settings,
        manifest=_tree(folder / "manifest.json"),
        results=newest,
        steps_of=steps_of,
        evaluations=_with_entries(evaluations, entries, newest.get("weights")),
        columns=columns,
        events=events,
        skips=_read_skips(folder),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: any of the files that `read_run` shows curves or results of."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "eval.json", "config.yaml"))


def _read_metrics(path: Path) -> tuple[dict[str, Column], list[dict[str, Any]]]:
    """Every numeric column, 8 bytes a value, and lines that tell of an event."""
    steps: dict[str, array[float]] = {}
    values: dict[str, array[float]] = {}
    events = []
    for line in each_line(path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if "begins" in line:
            events.append(line)
            continue
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                if name not in steps:
                    steps[name], values[name] = array("d"), array("d")
                steps[name].append(step)
                values[name].append(value)
    return {name: Column(np.array(steps[name]), np.array(values[name])) for name in steps}, events


def _newest(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """The newest entry, with suites that it lacks from the entries before it, and the steps of those."""
    if not entries:
        return {}, {}
    last = entries[-1]
    found, steps_of = dict(last), {}
    for entry in reversed(entries):
        if entry.get("weights") != last.get("weights"):
            continue
        for suite, results in entry.items():
            if suite not in ABOUT and results and not found.get(suite):
                found[suite] = results
                if entry["step"] != last["step"]:
                    steps_of[suite] = entry["step"]
    return found, steps_of


def _with_entries(
    columns: Mapping[str, Column], entries: Sequence[Mapping[str, Any]], weights: str | None
) -> dict[str, Column]:
    """Headlines over steps: those of eval.json, which also knows the evaluation at the end, join those of metrics.jsonl."""
    points = {name: dict(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for name, c in columns.items()}
    for entry in entries:
        if entry.get("weights") == weights:
            for suite, numbers in headlines(entry).items():
                for name, value in numbers.items():
                    points.setdefault(f"{suite}/{name}", {})[entry["step"]] = value
    return {
        name: Column(np.array(sorted(found), float), np.array([found[step] for step in sorted(found)], float))
        for name, found in points.items()
    }


def _read_skips(folder: Path) -> dict[str, Any] | None:
    """Counts by reason with the first few samples, over the ledgers of all ranks."""
    paths = sorted(folder.glob("skips*.jsonl"))
    if not paths:
        return None
    groups: dict[str, dict[str, Any]] = {}
    for path in paths:
        for line in each_line(path):
            if "event" in line:  # of a whole step, not of a sample
                continue
            group = groups.setdefault(line["reason"], {"reason": line["reason"], "count": 0, "first": []})
            group["count"] += 1
            if len(group["first"]) < _SKIPS_SHOWN:
                group["first"].append({**line, "shard": Path(line["shard"]).name})
    ordered = sorted(groups.values(), key=lambda group: -group["count"])
    return {"total": sum(group["count"] for group in ordered), "groups": ordered}


def _tree(path: Path) -> dict[str, Any]:
    """A YAML or JSON file as a plain tree; nothing where there is no file."""
    if not path.exists():
        return {}
    try:
        found = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it is not as it was written") from None
    return found if isinstance(found, dict) else {}
