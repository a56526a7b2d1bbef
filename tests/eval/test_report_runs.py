"""`mmctx report`: pages of one run and of several, of long ones, of new ones."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import ATTACK, write_run

import mmctx
from mmctx.cli import app
from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.errors import DataError
from mmctx.eval.report.page import render_page
from mmctx.eval.report.run import read_run
from mmctx.eval.report.sections import SECTIONS
from mmctx.train.config import RunConfig


@pytest.fixture(scope="module")
def held_out(run_tree: dict[str, Any]) -> RunData:
    config = build_config(RunConfig, run_tree, "test")
    return build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)


class Page(HTMLParser):
    """Sections and headings of a page, and whether every element that was opened is closed."""

    VOID = frozenset(("meta", "img", "link", "br", "hr", "image", "use", "rect", "line", "circle"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.scripts = 0
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "poster")]
        if tag == "section":
            self.sections.append(values.get("id") or "")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


class TestPages:
    def test_one_run(self, two_runs: tuple[Path, Path], held_out: RunData) -> None:
        run = read_run(two_runs[0])
        text = render_page([run], {run.name: held_out})
        page = Page(text)
        assert page.scripts == 0
        assert ATTACK not in text
        assert page.sections[: len(SECTIONS)] == list(SECTIONS)
        assert {
            "loss",
            "curves",
            "evaluations",
            "pictures",
            "sounds",
            "attribution",
            "data",
            "skips",
            "config",
            "skipped",
        } <= set(page.sections)
        assert "Found at step 30" in text  # losses alone were found at step 60
        assert all(address.startswith(("#", "data:")) for address in page.addresses)

    def test_two_runs(self, two_runs: tuple[Path, Path], tmp_path: Path) -> None:
        path = mmctx.report(*two_runs, out=tmp_path / "page.html")
        text = path.read_text()
        page = Page(text)
        assert "<h1>2 runs side by side</h1>" in text
        assert page.scripts == 0
        assert all(address.startswith(("#", "data:")) for address in page.addresses)
        assert page.sections[: len(SECTIONS)] == list(SECTIONS)
        assert re.search(r"<th>train.optimizer.lr</th>\s*<td[^>]*>0.001</td>\s*<td[^>]*>0.002</td>", text)
        assert (
            text.count(">passkey by depth, %: short<") == text.count(">passkey by depth, %: long<") == 1
        )  # heat maps beside each other

    def test_answers_are_drawn_on_their_document(self, two_runs: tuple[Path, Path], held_out: RunData) -> None:
        run = read_run(two_runs[0])
        text = render_page([run], {run.name: held_out})
        drawn = text[text.index('class="cards answers"') : text.index('<section id="data"')]
        patches = re.findall(
            r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="16.00" height="16.00" opacity="([\d.]+)"', drawn
        )
        assert patches[:2] == [
            ("against", "0.00", "0.00", "0.30"),
            ("for", "16.00", "16.00", "0.60"),
        ]  # 10 of 999 is too pale
        assert len(patches) == 2 * 3  # by three methods
        assert drawn.count('href="data:image/png') == 1  # the picture once
        assert drawn.count('href="#a0-0-0"') == 2
        assert "the held-out data are not at hand" in render_page([run], {})

    def test_runs_of_one_name_are_told_apart(self, run_tree: dict[str, Any], tmp_path: Path) -> None:
        runs = [write_run(tmp_path / place / "same", run_tree, steps=5) for place in ("a", "b")]
        text = mmctx.report(*runs).read_text()
        assert "a/same" in text
        assert "b/same" in text
        assert (tmp_path / "a" / "report.html").exists()  # beside the first

    def test_a_run_that_has_only_begun(self, run_tree: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.yaml").write_text(
            yaml.safe_dump(build_config(RunConfig, run_tree, "test").model_dump(mode="json"))
        )
        sections = Page(mmctx.report(tmp_path / "new").read_text()).sections
        assert set(sections) == {"batch", "config"}

    def test_folders_that_hold_no_run_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not a run folder"):
            mmctx.report(tmp_path)

    def test_the_command_says_where_the_page_is(self, two_runs: tuple[Path, Path], tmp_path: Path) -> None:
        from typer.testing import CliRunner

        out = tmp_path / "x.html"
        found = CliRunner().invoke(app, ["report", str(two_runs[0]), str(two_runs[1]), "--out", str(out), "--json"])
        answer = json.loads(found.stdout)
        assert answer["report"] == str(out)
        assert answer["runs"][str(two_runs[0])]["step"] == 60
        assert out.exists()

    def test_a_hundred_thousand_lines_are_thinned_in_little_time(
        self, two_runs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(two_runs[0], tmp_path / "long")
        with (folder / "metrics.jsonl").open("w") as file:
            for step in range(1, 100_001):
                spike = 1000.0 if step == 50_000 else 0.0
                line = {
                    "step": step,
                    "loss": 3 / step + 1 + spike,
                    "loss/captioning": 1.0,
                    "lr": 1e-3,
                    "tokens": step,
                    "data_wait": 0.1,
                }
                file.write(json.dumps(line) + "\n")
        started = time.process_time()
        run = read_run(folder)
        text = render_page([run], {})
        assert time.process_time() - started < 20  # 2 s on an idle core
        points = re.findall(r'class="line" points="([^"]+)"', text)
        assert max(len(part.split()) for part in points) == 400
        assert len(text) < 2_000_000
