"""What a page is made of: sections of tables, charts, heat maps and notes, as data. `side_by_side` joins those of several runs.

A section file makes pieces of one run's results and knows nothing of HTML or of other runs; `templates/pieces.html.jinja` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

Values = Sequence[float] | Sequence[float | None] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One value of a table.

    Attributes:
        text: as it is shown.
        share: 0 to 1, drawn as a bar; None for no bar.
        chance: what guessing reaches, a tick in the bar.
        about: what pointing at it says, such as its interval.
        strong: set in bold colour: what passes.
    """

    text: str
    share: float | None = None
    chance: float | None = None
    about: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its label, and a cell or nothing for every column."""

    label: str
    cells: tuple[Cell | None, ...]
    swatch: str = ""
    """Class of a colour before the label, such as `s0`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows by columns. `name` tells it from the other parts of its section, and `corner` says what its rows are."""

    kind: ClassVar[str] = "table"
    name: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def has_bars(self, column: int) -> bool:
        """Whether a column is one of shares, not of figures that stand on the right."""
        return any(
            cell is not None and cell.share is not None for row in self.rows for cell in row.cells[column : column + 1]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line of a chart: y over x, with the band between `low` and `high` where they are given (None leaves a gap).

    Attributes:
        smooth: draw a moving average, and the values faintly.
        dots: mark every value.
    """

    label: str
    x: Values
    y: Values
    low: Values = ()
    high: Values = ()
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A chart of one or more series.

    Attributes:
        name: tells it from the other parts of its section.
        label: above the chart.
        series: at least one.
        x_label: what x counts.
        reference: value of a dashed line, such as chance; `reference_label` names it.
        log_x: powers of two are equally far from each other.
        share: y are shares, shown from 0 to 100%.
        wide: a larger chart.
    """

    kind: ClassVar[str] = "lines"
    name: str
    label: str
    series: tuple[Series, ...]
    x_label: str = ""
    reference: float | None = None
    reference_label: str = ""
    log_x: bool = False
    share: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Values over a grid, 0 to 1 from pale to full; None where nothing was measured.

    Attributes:
        corner: what rows and columns are, such as `depth \\ tokens`.
        rows: labels.
        columns: labels.
        values: for each row a cell for each column; `share` is its colour.
    """

    kind: ClassVar[str] = "heat"
    name: str
    label: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[Cell | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence or two between the other parts."""

    kind: ClassVar[str] = "note"
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Ready-made HTML: a template of its own draws it. `values` are the template's."""

    kind: ClassVar[str] = "drawing"
    name: str
    template: str
    values: Mapping[str, Any]


Part = Table | Lines | HeatMap | Note | Drawing


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section of the page: `about` tells in plain words what is measured and how to read it."""

    id: str
    title: str
    about: str = ""
    parts: tuple[Part, ...] = ()


def side_by_side(sections: Mapping[str, Section | None]) -> Section | None:
    """One section of what several runs found, by the name of the run: parts of one name are joined, where they can be.

    Tables get a column for each run, charts a line for each; heat maps and charts of many lines stand beside each other.
    """
    found = {run: section for run, section in sections.items() if section is not None and section.parts}
    if not found:
        return None
    first = next(iter(found.values()))
    if len(sections) == 1:
        return first
    names = list(dict.fromkeys(part.name for section in found.values() for part in section.parts))
    parts: list[Part] = []
    for name in names:
        of_runs = {run: part for run, section in found.items() for part in section.parts if part.name == name}
        parts += _join(of_runs, list(sections))
    return replace(first, parts=tuple(parts))


def _join(parts: Mapping[str, Part], runs: Sequence[str]) -> list[Part]:
    """`runs` are all runs of the page, of which some may not have the part: colours and columns stay those of the page."""
    first = next(iter(parts.values()))
    if isinstance(first, Table):
        return [_join_tables({run: part for run, part in parts.items() if isinstance(part, Table)}, runs)]
    if isinstance(first, Lines):
        charts = {run: part for run, part in parts.items() if isinstance(part, Lines)}
        if all(len(chart.series) == 1 for chart in charts.values()):
            return [_join_lines(charts, runs)]
        return [
            replace(chart, name=f"{chart.name} {run}", label=f"{chart.label}: {run}") for run, chart in charts.items()
        ]
    if isinstance(first, HeatMap):
        return [replace(part, label=f"{part.label}: {run}") for run, part in parts.items() if isinstance(part, HeatMap)]
    if isinstance(first, Note):
        texts = {run: part.text for run, part in parts.items() if isinstance(part, Note)}
        if len(set(texts.values())) == 1:
            return [first]
        return [Note(name=f"{first.name} {run}", text=f"{run}: {text}") for run, text in texts.items()]
    return list(parts.values())


def _join_tables(tables: Mapping[str, Table], runs: Sequence[str]) -> Table:
    """A row for each row and column of the tables, a column for each run."""
    first = next(iter(tables.values()))
    cells: dict[tuple[str, str], dict[str, Cell | None]] = {}
    for run, table in tables.items():
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                cells.setdefault((row.label, column), {})[run] = cell
    order = {label: number for number, label in enumerate(dict.fromkeys(label for label, _ in cells))}
    single = all(len(table.columns) == 1 for table in tables.values())
    rows = [
        Row(label if single else f"{label} · {column}", tuple(found.get(run) for run in runs))
        for (label, column), found in sorted(cells.items(), key=lambda item: order[item[0][0]])
        if any(found.values())
    ]
    return replace(first, columns=tuple(runs), rows=tuple(rows))


def _join_lines(charts: Mapping[str, Lines], runs: Sequence[str]) -> Lines:
    first = next(iter(charts.values()))
    nothing = Series(label="", x=(), y=())
    series = [
        replace(charts[run].series[0], label=run) if run in charts else replace(nothing, label=run) for run in runs
    ]
    same = len({chart.reference for chart in charts.values()}) == 1
    return replace(first, series=tuple(series), reference=first.reference if same else None)
