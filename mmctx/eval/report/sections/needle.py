"""Sections of the suites `needle`, `passkey` and `world`, which have one shape: effective lengths, curves over lengths, heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmctx.eval.report.pieces import Cell, HeatMap, Lines, Note, Part, Row, Section, Series, Table
from mmctx.eval.report.sections.cells import percent, score_cell

_RULES = {"ruler": "effective (RULER)", "strict": "effective (strict)", "exact": "effective, generated"}


def grid_section(id: str, title: str, about: str) -> Callable[[Mapping[str, Any]], Section | None]:
    """Makes the section function of a suite of this shape."""

    def section(results: Mapping[str, Any]) -> Section | None:
        kinds: Mapping[str, Any] = results.get("kinds") or {}
        if not kinds:
            return None
        parts: list[Part] = [_effective(results, kinds), *_curves(results, kinds)]
        parts += [_heat_map(kind, found["heat"]) for kind, found in kinds.items() if found.get("heat")]
        if results.get("examples"):
            parts.append(_examples(results["examples"]))
        parts += _notes(results)
        return Section(id=id, title=title, about=f"{about} {_HOW}", parts=tuple(parts))

    return section


_HOW = (
    "An answer is chosen by log-probability among candidates; the tick is what guessing reaches, and bands are 95% Wilson "
    "intervals. A length passes from 85.6% on, with the interval above chance. RULER's effective length is the longest that passes; "
    "the strict one asks that all shorter ones pass, too."
)


def _effective(results: Mapping[str, Any], kinds: Mapping[str, Any]) -> Table:
    """A row for each kind: effective lengths, the score at every length, and the controls."""
    lengths = list(dict.fromkeys(length for found in kinds.values() for length in found["lengths"]))
    rules = [rule for rule in _RULES if any(rule in (found.get("effective") or {}) for found in kinds.values())]
    controls = list(dict.fromkeys(name for found in kinds.values() for name in found.get("controls") or {}))
    rows = []
    if len(kinds) > 1 and results.get("lengths"):
        cells = [_length_cell((results.get("effective") or {}).get(rule)) for rule in rules]
        cells += [score_cell(results["lengths"].get(length), "share") for length in lengths]
        rows.append(Row("mean over kinds", (*cells, *(None for _ in controls))))
    for kind, found in kinds.items():
        cells = [_length_cell((found.get("effective") or {}).get(rule)) for rule in rules]
        cells += [score_cell(found["lengths"].get(length), "share") for length in lengths]
        cells += [score_cell((found.get("controls") or {}).get(name), "share") for name in controls]
        rows.append(Row(kind.replace("_", " "), tuple(cells)))
    columns = [
        *(_RULES[rule] for rule in rules),
        *(f"{int(n):,} tokens" for n in lengths),
        *(f"control: {name}" for name in controls),
    ]
    return Table(name="effective", corner="kind", columns=tuple(columns), rows=tuple(rows))


def _length_cell(found: Mapping[str, Any] | None) -> Cell | None:
    if not found or found.get("length") is None:
        return None
    low, high = found.get("low"), found.get("high")
    about = "" if low is None or high is None else f"95% interval {int(low):,} to {int(high):,} tokens"
    return Cell(
        text=f"{int(found['length']):,}" if found["length"] else "none", about=about, strong=bool(found["length"])
    )


def _curves(results: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[Lines]:
    """The mean over kinds, and a chart for each kind; a suite of one kind has one chart."""
    charts = []
    if len(kinds) > 1 and results.get("lengths"):
        charts.append(_curve("mean", "mean over kinds", results["lengths"], wide=True))
    charts += [
        _curve(kind, kind.replace("_", " "), found["lengths"], wide=len(kinds) == 1) for kind, found in kinds.items()
    ]
    return charts


def _curve(name: str, label: str, lengths: Mapping[str, Any], *, wide: bool) -> Lines:
    points = sorted((int(length), score) for length, score in lengths.items() if score.get("share") is not None)
    y, low, high = ([score.get(key) for _, score in points] for key in ("share", "low", "high"))
    chances = {score["chance"] for _, score in points if score.get("chance") is not None}
    return Lines(
        name=f"curve {name}",
        label=label,
        series=(Series(label="", x=[x for x, _ in points], y=y, low=low, high=high, dots=True),),
        x_label="tokens",
        reference=sum(chances) / len(chances) if chances else None,
        reference_label="chance",
        log_x=True,
        share=True,
        wide=wide,
    )


def _heat_map(kind: str, heat: Mapping[str, Any]) -> HeatMap:
    """Depths downwards, lengths to the right, as needle tests are usually drawn."""
    depths = sorted({depth for found in heat.values() for depth in found}, key=float)
    return HeatMap(
        name=f"heat {kind}",
        label=kind.replace("_", " "),
        corner="depth \\ tokens",
        rows=tuple(f"{float(depth):.0%}" for depth in depths),
        columns=tuple(f"{int(length):,}" for length in heat),
        values=tuple(tuple(score_cell(found.get(depth), "share") for found in heat.values()) for depth in depths),
    )


def _examples(examples: list[Mapping[str, Any]]) -> Table:
    columns = {
        "length": "tokens",
        "question": "question",
        "references": "answer",
        "choice": "chosen",
        "prediction": "generated",
    }
    rows = [
        Row(str(example.get("kind", "")).replace("_", " "), tuple(_text_cell(example.get(name)) for name in columns))
        for example in examples
    ]
    return Table(name="examples", corner="example", columns=tuple(columns.values()), rows=tuple(rows))


def _text_cell(value: Any) -> Cell | None:
    if value is None:
        return None
    return Cell(
        text=f"{value:,}"
        if isinstance(value, int)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def _notes(results: Mapping[str, Any]) -> list[Part]:
    found: list[Part] = []
    if grid := results.get("grid"):
        depths = ", ".join(percent(depth) for depth in grid.get("depths", ()))
        samples, haystack = grid.get("samples", "?"), grid.get("haystack", "")
        found.append(
            Note(
                name="grid",
                text=f"{samples} documents for each length and depth (depths {depths}); haystack: {haystack}.",
            )
        )
    if left_out := results.get("left_out"):
        names = [f"{entry['kind']}{_at(entry.get('length'))}: {entry['reason']}" for entry in left_out]
        found.append(Note(name="left out", text="Left out: " + "; ".join(names)))
    return found


def _at(length: int | None) -> str:
    return "" if length is None else f" at {length:,} tokens"
