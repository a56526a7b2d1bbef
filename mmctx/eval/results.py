"""`eval.json`: what was found at each step of a run.

One entry for each step and kind of weights: `{"step", "tokens", "weights", "train_seconds", SUITE: its results, ..., "skipped"}`, in the
order of steps. Running a suite again replaces its results, and keeps those of the others.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmctx.errors import DataError

RESULTS_FILE = "eval.json"
# What an entry holds beside suites.
ABOUT = ("step", "tokens", "weights", "train_seconds", "skipped")


def read_results(run_dir: Path) -> list[dict[str, Any]]:
    """All entries, earlier steps first; none where nothing was evaluated.

    Raises:
        DataError: the file is not as it was written.
    """
    path = run_dir / RESULTS_FILE
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["evaluations"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete it to evaluate anew") from None


def add_results(run_dir: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Puts results of one step into the file, together with what other suites found there before; returns that entry."""
    results = _rounded(results)
    entries = {_place(entry): entry for entry in read_results(run_dir)}
    entry = _joined(entries.get(_place(results), {}), results)
    entries[_place(results)] = entry
    kept = [entries[place] for place in sorted(entries)]
    _write(run_dir / RESULTS_FILE, {"evaluations": kept})
    return entry


def drop_later(run_dir: Path, last_step: int) -> None:
    """Forgets what was found after `last_step`: a resumed run goes through these steps again."""
    entries = read_results(run_dir)
    kept = [entry for entry in entries if entry["step"] <= last_step]
    if len(kept) < len(entries):
        _write(run_dir / RESULTS_FILE, {"evaluations": kept})


def _place(entry: Mapping[str, Any]) -> tuple[int, str]:
    return entry["step"], entry["weights"]


def _joined(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    # a suite meets only those unusable samples that it reads: the larger count knows more
    skipped = dict(Counter(earlier.get("skipped", {})) | Counter(now["skipped"]))
    return {**earlier, **now, "skipped": skipped}


def _rounded(value: Any) -> Any:
    """Six significant digits; NaN and infinity become null, which JSON can hold."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    """Replaces the file as a whole: a reader never meets half of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
