"""Sections of the suites that ask what embeddings hold: `sts`, `probe` and `zero_shot`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmctx.eval.report.pieces import Cell, Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell, interval, score_cell, share_cell

_MAX_CLASSES = 40
_READINGS = ("input", "trunk", "embedding")


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
    """A row for each view and reading: a linear probe and nearest neighbours on frozen embeddings."""
    views = {name: found for name, found in results.items() if isinstance(found, Mapping) and found.get("classes")}
    if not views:
        return None
    readings = [(name, view, reading) for name, view in views.items() for reading in _READINGS if reading in view]
    classifiers = list(dict.fromkeys(kind for _, view, reading in readings for kind in view[reading]))
    rows = [
        Row(f"{name}, {reading}", tuple(_probe_cell(view[reading].get(kind), view) for kind in classifiers))
        for name, view, reading in readings
    ]
    columns = tuple("linear probe" if kind == "linear" else kind for kind in classifiers)
    counts = {"classes": "classes", "n_train": "training samples", "n": "held-out samples"}
    about = [
        Row(
            name,
            (
                Cell(text=str(view["label"])),
                *(count_cell(view.get(count)) for count in counts),
                share_cell(view.get("chance")),
                share_cell(view.get("majority")),
            ),
        )
        for name, view in views.items()
    ]
    asked = ("label", *counts.values(), "chance", "majority")
    return Section(
        id="probe",
        title="Probes of frozen embeddings",
        about="How well a linear classifier, and the nearest neighbours among training samples, tell the classes of held-out samples: "
        "by the mean of what goes into the trunk (input), of what comes out of it (trunk), and by the embedding that is trained for "
        "similarity. The tick is what always naming the commonest class of training, the majority, reaches.",
        parts=(
            Table(name="accuracy", corner="view", columns=columns, rows=tuple(rows)),
            Table(name="asked", corner="view", columns=asked, rows=tuple(about)),
        ),
    )


def _probe_cell(found: Mapping[str, Any] | None, view: Mapping[str, Any]) -> Cell | None:
    if not found:
        return None
    cell = share_cell(found.get("accuracy"), view.get("majority"), about=interval({**found, "n": view.get("n")}))
    return cell and replace(cell, tick="majority")


def zero_shot_section(results: Mapping[str, Any]) -> Section | None:
    """A row for each medium and objective, and one for each class where there are few."""
    views = {name: found for name, found in results.items() if isinstance(found, Mapping) and found.get("n")}
    if not views:
        return None
    columns = {"top1": "top 1", "top5": "top 5", "mean_per_class": "mean over classes"}
    shown = [name for name in columns if any(name in found for found in views.values())]
    rows = [
        Row(view, (*(_zero_shot_cell(name, found) for name in shown), count_cell(found["n"])))
        for view, found in views.items()
    ]
    table = Table(
        name="accuracy", corner="view / objective", columns=(*(columns[name] for name in shown), "n"), rows=tuple(rows)
    )
    classes = list(dict.fromkeys(label for found in views.values() for label in found.get("per_class", {})))
    by_class = [
        Row(
            label,
            tuple(share_cell(found.get("per_class", {}).get(label), found.get("chance")) for found in views.values()),
        )
        for label in classes
    ]
    parts = [table]
    if len(classes) <= _MAX_CLASSES and by_class:
        parts.append(Table(name="classes", corner="class", columns=tuple(views), rows=tuple(by_class)))
    return Section(
        id="zero_shot",
        title="Zero-shot classification",
        about="Which of a list of classes does a held-out picture or clip show? That whose texts, embedded, lie nearest, or that "
        "whose text the model writes likeliest. The tick is what guessing reaches.",
        parts=tuple(parts),
    )


def _zero_shot_cell(name: str, found: Mapping[str, Any]) -> Cell | None:
    chance = found.get("chance")
    if name == "top1":
        return score_cell(found, "top1")
    return share_cell(found.get(name), None if chance is None else min(5 * chance, 1.0) if name == "top5" else chance)
