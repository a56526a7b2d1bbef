"""The section on configurations: of one run all of it, of several what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from mmctx.eval.report.pieces import Cell, Drawing, Part, Row, Section, Table
from mmctx.eval.report.run import Run

_NAMES = ("run.name", "run.dir")
_SHOWN = 80  # characters of a value


def settings_section(runs: Sequence[Run]) -> Section | None:
    """Keys that differ, with a column for each run, and every configuration in full."""
    parts: list[Part] = []
    about = "Every value of the run, defaults included."
    if len(runs) > 1:
        rows = differences({run.name: run.settings for run in runs})
        about = f"{len(rows)} keys differ between the runs." if rows else "The runs have the same configuration."
        if rows:
            columns = tuple(run.name for run in runs)
            parts.append(Table(name="differences", corner="key", columns=columns, rows=tuple(rows)))
    for run in runs:
        if run.settings:
            text = yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True)
            label = "resolved config" if len(runs) == 1 else f"resolved config of {run.name}"
            parts.append(
                Drawing(name=f"config {run.name}", template="config.html.jinja", values={"label": label, "text": text})
            )
    return Section(id="config", title="Configuration", about=about, parts=tuple(parts)) if parts else None


def differences(settings: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each dotted key whose value is not the same in all runs; names and folders of runs do not count.

    A value that a run lacks, such as those of another kind of objective, is empty.
    """
    flat = {run: dict(_flatten(tree)) for run, tree in settings.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = []
    for key in keys:
        texts = [values.get(key) for values in flat.values()]
        if len(set(texts)) > 1 and key not in _NAMES:
            rows.append(Row(key, tuple(None if text is None else _cell(text) for text in texts)))
    return rows


def _cell(text: str) -> Cell:
    return Cell(text=text) if len(text) <= _SHOWN else Cell(text=text[: _SHOWN - 1] + "…", about=text)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
