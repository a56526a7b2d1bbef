"""Section of the suite `recall`: a curve over lengths for each stage of the run, a heat map, tables of the newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmctx.eval.report.pieces import Cell, HeatMap, Lines, Note, Part, Row, Section, Series, Table
from mmctx.eval.report.sections.cells import count_cell, percent, score_cell
from mmctx.eval.suites.recall import passes

_KINDS = {"needle": "Needles in text", "picture": "Values of pictures", "recall": "Pairs of words"}


def recall_section(results: Mapping[str, Any]) -> Section | None:
    """See the file; nothing where no held-out document had questions."""
    lengths: Mapping[str, Any] = results.get("lengths") or {}
    if not lengths:
        return None
    parts: list[Part] = [
        _curves(results, lengths),
        _kinds(lengths),
        _heat_map("all", {n: found["depths"] for n, found in lengths.items()}),
    ]
    parts += _maps_of_kinds(results)
    controls = results.get("controls")
    if controls:
        alone, removed = controls["alone"], controls["removed"]
        text = (
            f"Controls, on the shortest documents: with nothing but the fact before its question {percent(alone['exact'])} are right, "
            f"without the facts that are asked {percent(removed['exact'])} (chance {percent(removed['chance'])})."
        )
        parts.append(Note(name="controls", text=text))
    return Section(
        id="recall",
        title="Recall over the length of documents",
        about="Facts are stated once, at depths spread evenly over a document, and asked once at its end. A point is the share of "
        "answers that are the likeliest token of the whole vocabulary, with its 95% Wilson interval. A length passes from 85.6% on, "
        "as in RULER, with the interval above chance.",
        parts=tuple(parts),
    )


def _curves(results: Mapping[str, Any], lengths: Mapping[str, Any]) -> Lines:
    now = {"label": "", "lengths": {length: found["all"] for length, found in lengths.items()}}
    series = []
    for stage in results.get("stages") or [now]:
        points = sorted((int(length), found) for length, found in stage["lengths"].items())
        y, low, high = ([found[name] for _, found in points] for name in ("exact", "low", "high"))
        series.append(Series(label=stage["label"], x=[x for x, _ in points], y=y, low=low, high=high, dots=True))
    chance = next(iter(lengths.values()))["all"]["chance"]
    return Lines(
        name="curve",
        label="exact answers",
        series=tuple(series),
        x_label="tokens of the document",
        reference=chance,
        reference_label="chance",
        log_x=True,
        share=True,
        wide=True,
    )


def _maps_of_kinds(results: Mapping[str, Any]) -> list[Part]:
    """A map of each kind; of a run with stages, one after each: the edge where recall ends moves with the context trained on."""
    stages = [stage for stage in results.get("stages") or () if stage.get("heat")]
    if not stages:
        return [_heat_map(kind, heat) for kind, heat in (results.get("heat") or {}).items()]
    parts: list[Part] = []
    for kind, name in _KINDS.items():
        if all(kind in stage["heat"] for stage in stages):
            parts.append(
                Note(name=f"maps of {kind}", text=f"{name}, exact answers by length and depth after each stage, in %:")
            )
            parts += [replace(_heat_map(f"{kind} {s['label']}", s["heat"][kind]), label=s["label"]) for s in stages]
    return parts


def _heat_map(kind: str, heat: Mapping[str, Any]) -> HeatMap:
    """Depths downwards (0 is the start of the document, 1 right before the questions), lengths to the right."""
    depths = list(dict.fromkeys(depth for found in heat.values() for depth in found))
    return HeatMap(
        name=f"heat {kind}",
        label=f"exact answers by depth, %: {kind}",
        corner="depth \\ tokens",
        rows=tuple(depths),
        columns=tuple(f"{int(length):,}" for length in heat),
        values=tuple(tuple(score_cell(found.get(depth), "exact") for found in heat.values()) for depth in depths),
    )


def _kinds(lengths: Mapping[str, Any]) -> Table:
    kinds = ["all", *(kind for kind in next(iter(lengths.values())) if kind not in ("all", "depths"))]
    rows = []
    for length, found in lengths.items():
        passed = passes(found["all"])
        cells = [score_cell(found.get(kind), "exact") for kind in kinds]
        rows.append(
            Row(
                f"{int(length):,}",
                (*cells, count_cell(found["all"]["n"]), Cell(text="yes" if passed else "no", strong=passed)),
            )
        )
    return Table(name="kinds", corner="tokens", columns=(*kinds, "n", "passes"), rows=tuple(rows))
