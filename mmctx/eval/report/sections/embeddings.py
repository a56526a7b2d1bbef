"""Sections of the suites that ask what embeddings hold: `sts`, `probe`, `zero_shot`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Cell, Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell, interval, number_cell, score_cell, share_cell


def sts_section(results: Mapping[str, Any]) -> Section | None:
    """Spearman's rank correlation with people's judgement, a row for each file."""
    files = {
        name: found
        for name, found in results.items()
        if isinstance(found, Mapping) and found.get("spearman") is not None
    }
    if not files:
        return None
    rows = []
    for name, found in files.items():
        about = f"95% interval {found['low']:.3f} to {found['high']:.3f}" if found.get("low") is not None else ""
        bar = Cell(text=f"{found['spearman']:.3f}", share=max(found["spearman"], 0.0), about=about)
        rows.append(Row(name, (bar, count_cell(found.get("n")))))
    return Section(
        id="sts",
        title="Semantic textual similarity",
        about="Spearman's rank correlation between the cosine of two sentences' embeddings and how alike people found them. Chance is 0.",
        parts=(Table(name="spearman", corner="file", columns=("Spearman", "n"), rows=tuple(rows)),),
    )


def probe_section(results: Mapping[str, Any]) -> Section | None:
    """A row for each view and place: a linear probe and nearest neighbours on frozen embeddings."""
    views = {name: found for name, found in results.items() if isinstance(found, Mapping) and found.get("classes")}
    if not views:
        return None
    places = ("input", "trunk")
    neighbours = list(
        dict.fromkeys(k for view in views.values() for place in places for k in view.get(place, {}).get("knn", {}))
    )
    rows = []
    for name, view in views.items():
        for place in places:
            if not (found := view.get(place)):
                continue
            chance = view.get("chance")
            bars = [share_cell(found.get("linear"), chance, about=interval(found))]
            bars += [share_cell(found.get("knn", {}).get(k), chance) for k in neighbours]
            counts = [count_cell(view.get(count)) for count in ("classes", "n_train", "n")]
            rows.append(
                Row(f"{name}, {'into the trunk' if place == 'input' else 'out of the trunk'}", (*bars, *counts))
            )
    columns = ("linear probe", *(f"{k}-NN" for k in neighbours), "classes", "n train", "n")
    return Section(
        id="probe",
        title="Probes of frozen embeddings",
        about="How well a linear classifier, and the nearest neighbours, tell the classes of held-out samples from what goes into "
        "the trunk and from what comes out of it. The tick is the share of the commonest class.",
        parts=(Table(name="accuracy", corner="view", columns=columns, rows=tuple(rows)),),
    )


def zero_shot_section(results: Mapping[str, Any]) -> Section | None:
    """A row for each view: accuracy of naming the class by the nearest prompt."""
    views = {name: found for name, found in results.items() if isinstance(found, Mapping)}
    skipped = {"chance", "low", "high", "interval"}
    numbers = {
        name: {key: value for key, value in found.items() if isinstance(value, int | float) and key not in skipped}
        for name, found in views.items()
    }
    numbers = {name: found for name, found in numbers.items() if found}
    if not numbers:
        return None
    columns = tuple(dict.fromkeys(key for found in numbers.values() for key in found))
    rows = [
        Row(name.replace("_", " "), tuple(_zero_shot_cell(key, views[name]) for key in columns)) for name in numbers
    ]
    return Section(
        id="zero_shot",
        title="Zero-shot classification",
        about="Each held-out sample is given the class whose prompts, written out and embedded as texts, lie nearest. The tick is "
        "what guessing reaches.",
        parts=(
            Table(
                name="accuracy",
                corner="view",
                columns=tuple(key.replace("_", " ") for key in columns),
                rows=tuple(rows),
            ),
        ),
    )


def _zero_shot_cell(key: str, found: Mapping[str, Any]) -> Cell | None:
    value, chance = found.get(key), found.get("chance")
    if isinstance(value, int):
        return count_cell(value)
    if isinstance(value, float) and 0 <= value <= 1:
        if isinstance(chance, Mapping):
            return share_cell(value, chance.get(key))
        first = next(name for name, number in found.items() if isinstance(number, float))
        return score_cell(found, key) if key == first else share_cell(value)
    return number_cell(value)
