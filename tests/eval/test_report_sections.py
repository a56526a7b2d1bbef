"""Sections of every suite, and how those of several runs are joined."""

from __future__ import annotations

import re

import numpy as np
import pytest
from made_runs import all_results

from mmctx.eval.report.charts import draw_lines, nice_ticks, short_number
from mmctx.eval.report.examples import mark_differences
from mmctx.eval.report.pieces import Cell, HeatMap, Lines, Note, Row, Section, Series, Table, side_by_side
from mmctx.eval.report.sections import SECTIONS
from mmctx.eval.report.settings import differences
from mmctx.eval.suites import SUITES


class TestSections:
    @pytest.mark.parametrize("suite", sorted(SECTIONS))
    def test_every_suite_shows_something_and_nothing_without_results(self, suite: str) -> None:
        section = SECTIONS[suite](all_results()[suite])
        assert section is not None
        assert section.id == suite
        assert section.about
        assert len({part.name for part in section.parts}) == len(section.parts) > 0
        assert SECTIONS[suite]({}) is None
        for part in section.parts:
            if isinstance(part, Table):
                assert all(len(row.cells) == len(part.columns) for row in part.rows)
            if isinstance(part, HeatMap):
                assert [len(row) for row in part.values] == [len(part.columns)] * len(part.rows)
            if isinstance(part, Lines):
                assert "<polyline" in draw_lines(part)

    def test_suites_without_a_section_are_those_shown_elsewhere_or_plainly(self) -> None:
        assert set(SUITES) - set(SECTIONS) == {"loss", "attribution"}

    def test_chance_and_intervals_are_those_of_the_results(self) -> None:
        section = SECTIONS["retrieval"](all_results()["retrieval"])
        assert section is not None
        (table,) = section.parts
        assert isinstance(table, Table)
        assert table.columns == ("R@1", "R@5", "R@10", "MRR", "n", "candidates")
        first = table.rows[0].cells[0]
        assert first is not None
        assert (first.share, first.chance, first.about) == (0.25, 0.0125, "95% interval 10.0% to 40.0%")

    def test_a_store_s_states_stand_in_order_with_chance_where_answers_are_told(self) -> None:
        section = SECTIONS["knowledge"](all_results()["knowledge"])
        assert section is not None
        (table,) = section.parts
        assert isinstance(table, Table)
        assert [row.label for row in table.rows] == ["put in", "then changed", "then removed", "without the store"]
        shown = [[cell and (cell.text, cell.chance) for cell in row.cells] for row in table.rows]
        assert shown[0] == [("80.0%", 0.03125), None, ("100.0%", None)]
        assert shown[1] == [("80.0%", 0.03125), ("5.0%", 0.03125), ("90.0%", None)]
        assert shown[2] == [("2.0%", 0.03125), ("0.0%", 0.03125), ("0.0%", None)]
        assert shown[3] == [("4.0%", 0.03125), None, None]
        assert "80 questions" in section.about
        assert "3.1%" in section.about

    def test_heat_maps_have_depths_downwards_and_lengths_to_the_right(self) -> None:
        section = SECTIONS["passkey"](all_results(edge=1024)["passkey"])
        assert section is not None
        (heat,) = (part for part in section.parts if isinstance(part, HeatMap))
        assert heat.rows == ("0%", "25%", "50%", "75%", "100%")
        assert heat.columns == ("256", "512", "1,024", "2,048", "4,096")
        deepest, last = heat.values[4][0], heat.values[4][4]
        assert deepest is not None
        assert last is not None
        assert (deepest.share, last.share) == (pytest.approx(0.97), pytest.approx(0.97 / 4))

    def test_bands_end_where_intervals_are_unknown(self) -> None:
        section = SECTIONS["loss_by_position"](all_results()["loss_by_position"])
        assert section is not None
        chart = next(part for part in section.parts if isinstance(part, Lines))
        svg = draw_lines(chart)
        assert svg.count('class="whisker"') == 2  # on both sides of the gap one place each
        assert '<polygon class="band"' not in svg
        (excess,) = (part for part in section.parts if isinstance(part, Lines) and part.name == "excess")
        assert draw_lines(excess).count('<polygon class="band"') == 2


class TestSideBySide:
    def part(self, table: Table | Lines | HeatMap | Note) -> Section:
        return Section(id="s", title="s", parts=(table,))

    def table(self, *columns: str, value: float = 0.5) -> Table:
        return Table(
            name="t", corner="", columns=columns, rows=(Row("row", tuple(Cell(text=f"{value}") for _ in columns)),)
        )

    def test_tables_get_a_column_for_each_run(self) -> None:
        found = side_by_side(
            {"a": self.part(self.table("x", "y")), "b": None, "c": self.part(self.table("x", value=0.7))}
        )
        assert found is not None
        (table,) = found.parts
        assert isinstance(table, Table)
        assert table.columns == ("a", "b", "c")
        cells = {row.label: [cell and cell.text for cell in row.cells] for row in table.rows}
        assert cells == {"row · x": ["0.5", None, "0.7"], "row · y": ["0.5", None, None]}

    def test_charts_of_one_line_become_one_chart_in_the_colours_of_the_runs(self) -> None:
        lines = Lines(name="l", label="l", series=(Series(label="", x=[1, 2], y=[1, 2]),))
        found = side_by_side({"a": None, "b": self.part(lines)})
        assert found is not None
        (chart,) = found.parts
        assert isinstance(chart, Lines)
        assert [series.label for series in chart.series] == ["a", "b"]
        assert 'class="s1"' in draw_lines(chart)
        assert 'class="s0"' not in draw_lines(chart)

    def test_charts_of_many_lines_and_notes_stand_beside_each_other(self) -> None:
        line = Series(label="x", x=[1, 2], y=[1, 2])
        lines = Lines(name="l", label="chart", series=(line, line))
        found = side_by_side({"a": self.part(lines), "b": self.part(lines)})
        assert found is not None
        assert [part.label for part in found.parts if isinstance(part, Lines)] == ["chart: a", "chart: b"]
        notes = side_by_side({"a": self.part(Note(name="n", text="1")), "b": self.part(Note(name="n", text="2"))})
        assert notes is not None
        assert [part.text for part in notes.parts if isinstance(part, Note)] == ["a: 1", "b: 2"]

    def test_differences_are_those_of_the_trees(self) -> None:
        a = {"run": {"name": "a"}, "train": {"steps": 3, "lr": 1.0}, "objectives": {"x": {"kind": "captioning"}}}
        b = {
            "run": {"name": "b"},
            "train": {"steps": 4, "lr": 1.0},
            "objectives": {"x": {"kind": "captioning", "prompt": "p"}},
        }
        rows = {row.label: [cell and cell.text for cell in row.cells] for row in differences({"a": a, "b": b})}
        assert rows == {"train.steps": ["3", "4"], "objectives.x.prompt": [None, "p"]}


def chart(x, y, reference: float | None = None, smooth: bool = False) -> Lines:
    """A chart of one series."""
    return Lines(name="loss", label="loss", series=(Series(label="", x=x, y=y, smooth=smooth),), reference=reference)


class TestPieces:
    def test_differences_are_marked_by_word(self) -> None:
        assert mark_differences("a red cat", "A blue cat") == ("a <del>red</del> cat", "A <ins>blue</ins> cat")
        assert mark_differences("红色的猫", "红色的狗") == ("红色的<del>猫</del>", "红色的<ins>狗</ins>")
        assert mark_differences("a", "") == ("<del>a</del>", "")

    @pytest.mark.parametrize(
        "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 3.0], [1.0, float("nan"), 3.0], [1e-9, 1e9]]
    )
    def test_charts_stay_finite_and_inside(self, values: list[float]) -> None:
        svg = draw_lines(chart(range(len(values)), values, reference=2.0))
        points = re.findall(r'points="([^"]+)"', svg)[-1].split()
        assert len(points) == np.isfinite(values).sum()
        for point in points:
            x, y = map(float, point.split(","))
            assert 0 <= x <= 280
            assert 0 <= y <= 165

    def test_long_series_are_thinned(self) -> None:
        svg = draw_lines(chart(range(10_000), np.linspace(3, 1, 10_000).tolist(), smooth=True))
        assert len(re.findall(r'class="line" points="([^"]+)"', svg)[0].split()) == 400

    def test_charts_of_nothing(self) -> None:
        assert draw_lines(chart([1], [float("nan")])) == ""

    def test_ticks_are_round(self) -> None:
        assert nice_ticks(0, 1000, 4) == [0, 250, 500, 750, 1000]
        shown = [short_number(v) for v in (0, 0.0015, 0.25, 12_345, 3.4e6, -2)]
        assert shown == ["0", "1.5e-3", "0.25", "12.3k", "3.4M", "-2"]
