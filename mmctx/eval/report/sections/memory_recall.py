"""Section of the suite `memory_recall`: curves over the distance in windows, with the memory and without, and a table by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Lines, Row, Section, Series, Table
from mmctx.eval.report.sections.cells import count_cell, score_cell

_NAMES = {"on": "with the memory", "off": "windows alone"}


def memory_recall_section(results: Mapping[str, Any]) -> Section | None:
    """See the file; nothing where there was nothing to ask."""
    distances: Mapping[str, Any] = results.get("distances") or {}
    beyond = {int(back): modes for back, modes in distances.items() if int(back)}
    if not beyond:
        return None
    modes = list(next(iter(beyond.values())))
    window, reach = results["window"], results["reach"]
    through = "everything" if reach is None else f"{reach:,} tokens back"
    return Section(
        id="memory_recall",
        title="Recall beyond the window",
        about=f"Facts are asked whose only mention stands so many windows of {window:,} tokens back. A point is the share of answers "
        "that are the likeliest token of the whole vocabulary, with its 95% Wilson interval. The memory is switched off in the same "
        f"weights; windows, layer upon layer, reach {through}.",
        parts=(_curves(beyond, modes), _table(distances, modes)),
    )


def _curves(beyond: Mapping[int, Any], modes: list[str]) -> Lines:
    series = []
    for mode in modes:
        points = [found[mode]["all"] for found in beyond.values()]
        y, low, high = ([found[name] for found in points] for name in ("exact", "low", "high"))
        series.append(Series(label=_NAMES[mode], x=list(beyond), y=y, low=low, high=high, dots=True))
    return Lines(
        name="curve",
        label="exact answers",
        series=tuple(series),
        x_label="windows back",
        reference=next(iter(beyond.values()))["off"]["all"]["chance"],
        reference_label="chance",
        log_x=True,
        share=True,
        wide=True,
    )


def _table(distances: Mapping[str, Any], modes: list[str]) -> Table:
    kinds = sorted({kind for found in distances.values() for kind in found["off"]} - {"all"})
    columns = ["all", *kinds]
    rows = []
    for back, found in distances.items():
        name = f"{back}x to {2 * int(back)}x" if int(back) else "within it"
        for mode in modes:
            cells = [score_cell(found[mode].get(kind), "exact") for kind in columns]
            rows.append(Row(f"{name}, {_NAMES[mode]}", (*cells, count_cell(found[mode]["all"]["n"]))))
    return Table(name="kinds", corner="windows back", columns=(*columns, "n"), rows=tuple(rows))
