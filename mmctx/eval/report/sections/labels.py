"""Sections of the suites `classification` and `regression`: what documents were said to be, beside what saying it blindly gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.charts import short_number
from mmctx.eval.report.pieces import Cell, Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell, number_cell, score_cell, share_cell

_MAX_CLASSES = 40


def classification_section(results: Mapping[str, Any]) -> Section | None:
    """Accuracy and macro-F1 of each objective, its classes, and what was taken for what."""
    found = {name: scores for name, scores in results.items() if isinstance(scores, Mapping) and scores.get("n")}
    if not found:
        return None
    rows, parts = [], []
    for name, scores in found.items():
        blind = scores["majority"]
        chance = {"chance": blind["accuracy"], "n": scores["n"]}
        cells = score_cell({**scores, **chance}, "accuracy"), share_cell(scores["macro_f1"], blind["macro_f1"])
        rows.append(Row(name, (*cells, score_cell({**blind, "n": scores["n"]}, "accuracy"), count_cell(scores["n"]))))
        if len(scores["classes"]) <= _MAX_CLASSES:
            parts += [_classes(name, scores), _confusion(name, scores)]
    columns = ("accuracy", "macro-F1", "commonest class", "n")
    table = Table(name="accuracy", corner="objective", columns=columns, rows=tuple(rows))
    return Section(
        id="classification",
        title="Classification",
        about="How often the right class of a held-out document is named; macro-F1 counts every class alike. The tick is what naming "
        "the commonest class each time would reach.",
        parts=(table, *parts),
    )


def _classes(name: str, scores: Mapping[str, Any]) -> Table:
    columns = {"precision": "precision", "recall": "recall", "f1": "F1"}
    rows = [
        Row(label, (*(share_cell(of_class[key]) for key in columns), count_cell(of_class["n"])))
        for label, of_class in scores["per_class"].items()
    ]
    corner = f"{name}: class"
    return Table(name=f"classes of {name}", corner=corner, columns=(*columns.values(), "n"), rows=tuple(rows))


def _confusion(name: str, scores: Mapping[str, Any]) -> Table:
    rows = []
    for label, counts in zip(scores["classes"], scores["confusion"], strict=True):
        total = sum(counts)
        cells = (Cell(text=f"{count:,}", share=count / total if total else 0.0) for count in counts)
        rows.append(Row(label, tuple(cells)))
    columns = tuple(f"as {label}" for label in scores["classes"])
    return Table(name=f"confusion of {name}", corner=f"{name}: right class", columns=columns, rows=tuple(rows))


def regression_section(results: Mapping[str, Any]) -> Section | None:
    """Correlations and errors of each objective."""
    found = {name: scores for name, scores in results.items() if isinstance(scores, Mapping) and scores.get("n")}
    if not found:
        return None
    rows = []
    for name, scores in found.items():
        correlations = (_correlation_cell(scores[kind]) for kind in ("pearson", "spearman"))
        errors = (_error_cell(scores[kind]) for kind in ("mse", "mse_of_mean"))
        rows.append(Row(name, (*correlations, *errors, number_cell(scores["r2"]), count_cell(scores["n"]))))
    columns = ("Pearson", "Spearman", "squared error", "of the mean", "R²", "n")
    return Section(
        id="regression",
        title="Regression",
        about="How predicted numbers of held-out documents go with the right ones, and how far they are from them, beside predicting the "
        "mean of these labels each time.",
        parts=(Table(name="errors", corner="objective", columns=columns, rows=tuple(rows)),),
    )


def _correlation_cell(score: Mapping[str, float]) -> Cell:
    about = f"95% interval {score['low']:.3f} to {score['high']:.3f}"
    return Cell(text=f"{score['value']:.3f}", share=max(score["value"], 0.0), about=about)


def _error_cell(score: Mapping[str, Any]) -> Cell:
    about = (
        "" if score["low"] is None else f"95% interval {short_number(score['low'])} to {short_number(score['high'])}"
    )
    return Cell(text=short_number(score["mean"]), about=about)
