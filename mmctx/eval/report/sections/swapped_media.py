"""Section of the suite `swapped_media`: what wrong pictures and clips cost the text behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Cell, Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell

_COLUMNS = {"own": "with its own media", "swapped": "with another sample's", "excess": "difference"}


def swapped_media_section(results: Mapping[str, Any]) -> Section | None:
    """A row for each objective, losses in nats a token."""
    found = {name: part for name, part in results.items() if isinstance(part, Mapping) and part.get("own") is not None}
    if not found:
        return None
    rows = tuple(
        Row(name, (*(_cell(column, part) for column in _COLUMNS), count_cell(part.get("n"))))
        for name, part in found.items()
    )
    return Section(
        id="swapped_media",
        title="Swapped media",
        about="Does the text depend on the pictures and clips before it? Loss in nats a token, with a document's own media and with "
        "those of another sample: where they are not looked at, the difference is zero.",
        parts=(Table(name="losses", corner="objective", columns=(*_COLUMNS.values(), "n"), rows=rows),),
    )


def _cell(column: str, part: Mapping[str, Any]) -> Cell | None:
    if part.get(column) is None:
        return None
    low, high = part.get("low"), part.get("high")
    text = f"{part[column]:.3f}"
    if column != "excess" or low is None or high is None:
        return Cell(text=text)
    return Cell(text=text, about=f"95% interval {low:.3f} to {high:.3f}", strong=low > 0)
