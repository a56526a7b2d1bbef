"""What is shown of a suite that has no section of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmctx.eval.report.charts import short_number
from mmctx.eval.report.pieces import Cell, Row, Section, Table

_DEPTH, _MAX_ROWS = 4, 200


def plain_section(suite: str, results: Mapping[str, Any]) -> Section | None:
    """A table of its numbers and texts, nested ones as `a/b`; lists are left out."""
    rows = [Row(label, (Cell(text=text),)) for label, text in _flatten(results, _DEPTH)]
    if not rows:
        return None
    more = f" {len(rows) - _MAX_ROWS:,} more are in eval.json." if len(rows) > _MAX_ROWS else ""
    table = Table(name="numbers", corner="", columns=("",), rows=tuple(rows[:_MAX_ROWS]))
    return Section(
        id=suite, title=suite.replace("_", " "), about=f"Results of the suite {suite}.{more}", parts=(table,)
    )


def _flatten(results: Mapping[str, Any], depth: int) -> Iterator[tuple[str, str]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            if depth > 1:
                yield from ((f"{name}/{inner}", text) for inner, text in _flatten(value, depth - 1))
        elif isinstance(value, int | float):
            yield name, short_number(value)
        elif value is None or isinstance(value, str):
            yield name, "–" if value is None else value
