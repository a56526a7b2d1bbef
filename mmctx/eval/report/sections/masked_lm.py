"""Sections of the suites `masked_lm` and `next_sentence`: one accuracy each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell, share_cell


def masked_lm_section(results: Mapping[str, Any]) -> Section | None:
    """How often hidden tokens are found."""
    about = "How often the hidden token is the one that the model holds likeliest, over all masked positions of the held-out documents."
    return _accuracy("masked_lm", "Masked words", about, results)


def next_sentence_section(results: Mapping[str, Any]) -> Section | None:
    """How often it is seen whether one span follows another."""
    about = "How often the model tells whether the second span follows the first, over one pair of every held-out text."
    return _accuracy("next_sentence", "Next sentence", about, results, chance=0.5)


def _accuracy(
    id: str, title: str, about: str, results: Mapping[str, Any], chance: float | None = None
) -> Section | None:
    if results.get("accuracy") is None:
        return None
    row = Row("held out", (share_cell(results["accuracy"], chance), count_cell(results.get("n"))))
    table = Table(name="accuracy", corner="", columns=("accuracy", "n"), rows=(row,))
    return Section(id=id, title=title, about=about, parts=(table,))
