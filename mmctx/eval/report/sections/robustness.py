"""Section of the suite `robustness`: a curve over severity for every corruption, and how strong each severity is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmctx.eval.report.charts import short_number
from mmctx.eval.report.pieces import Cell, Lines, Row, Section, Series, Table

_UNITS = {
    "image/noise": "deviation of the noise, white is 1",
    "image/blur": "deviation in pixels of 224",
    "image/crop": "share of the area left",
    "audio/noise": "signal over noise, dB",
    "audio/speed": "times faster",
    "text/typos": "share of characters mistyped",
}


def robustness_section(results: Mapping[str, Any]) -> Section | None:
    """A chart for each modality, direction and measure, a line for each corruption; severity 0 is clean."""
    severities = results.get("severities") or []
    charts: dict[tuple[str, str], list[tuple[Series, float]]] = {}
    for corruption, task, series, chance in _curves(results, severities):
        charts.setdefault((corruption.partition("/")[0], task), []).append((series, chance))
    parts: list[Lines | Table] = [
        Lines(
            name=f"{modality} {task}",
            label=f"{modality}: {task}",
            series=tuple(series for series, _ in found),
            x_label="severity",
            reference=found[0][1],
            reference_label="chance",
            share=True,
        )
        for (modality, task), found in charts.items()
    ]
    if not parts:
        return None
    if levels := results.get("levels"):
        parts.append(_levels(levels, severities[1:]))
    return Section(
        id="robustness",
        title="Robustness",
        about="What is left when pictures, sounds and texts get worse, from severity to severity; 0 is clean. Corrupted views look for "
        "their clean partners among all that are held out, or for their class. Bands are 95% intervals.",
        parts=tuple(parts),
    )


def _curves(results: Mapping[str, Any], severities: Sequence[int]) -> Iterator[tuple[str, str, Series, float]]:
    """(corruption, what the chart shows, its curve, chance) of everything that was measured."""
    for corruption, directions in (results.get("retrieval") or {}).items():
        for direction, curve in directions.items():
            for cut, interval in curve["interval"].items():
                task = f"{direction.replace('_to_', ' → ')}, {cut}"
                low, high = zip(*interval, strict=True)
                yield corruption, task, _series(corruption, severities, curve[cut], low, high), curve["chance"][cut]
    for corruption, ways in (results.get("zero_shot") or {}).items():
        for way, curve in ways.items():
            task = f"zero-shot by {way.partition('/')[2]}, top 1"
            series = _series(corruption, severities, curve["top1"], curve["low"], curve["high"])
            yield corruption, task, series, curve["chance"]


def _series(
    corruption: str, x: Sequence[int], y: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> Series:
    return Series(label=corruption.partition("/")[2], x=x, y=y, low=low, high=high, dots=True)


def _levels(levels: Mapping[str, Sequence[float]], severities: Sequence[int]) -> Table:
    rows = [
        Row(
            f"{name.replace('/', ' ')}: {_UNITS[name]}" if name in _UNITS else name,
            tuple(Cell(text=short_number(v)) for v in values),
        )
        for name, values in levels.items()
    ]
    columns = tuple(str(severity) for severity in severities)
    return Table(name="levels", corner="severity", columns=columns, rows=tuple(rows))
