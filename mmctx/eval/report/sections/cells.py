"""Cells that several sections are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.charts import short_number
from mmctx.eval.report.pieces import Cell


def share_cell(
    share: float | None, chance: float | None = None, *, strong: bool = False, about: str = ""
) -> Cell | None:
    """A share as a bar, with chance as a tick; nothing where it was not measured."""
    if share is None:
        return None
    return Cell(text=percent(share), share=share, chance=chance, strong=strong, about=about)


def count_cell(count: float | None) -> Cell | None:
    """A whole number."""
    return None if count is None else Cell(text=f"{int(count):,}")


def number_cell(value: float | None) -> Cell | None:
    """Any number, in three digits."""
    return None if value is None else Cell(text=short_number(value))


def score_cell(
    score: Mapping[str, Any] | None, value: str, *, chance: bool = True, strong: bool = False
) -> Cell | None:
    """A share `score[value]` with its interval `low` to `high`, `chance` and `n`, each where the score has it."""
    if not score or score.get(value) is None:
        return None
    return share_cell(score[value], score.get("chance") if chance else None, strong=strong, about=interval(score))


def interval(score: Mapping[str, Any]) -> str:
    """`95% interval 0.1% to 3.2%, n 40`, as far as it is known."""
    parts = []
    if score.get("low") is not None and score.get("high") is not None:
        parts.append(f"95% interval {percent(score['low'])} to {percent(score['high'])}")
    if score.get("n") is not None:
        parts.append(f"n {int(score['n']):,}")
    return ", ".join(parts)


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "–" if value is None else f"{100 * value:.1f}%"
