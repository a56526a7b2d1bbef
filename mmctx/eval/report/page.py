"""The report: one page about a run, or about several side by side; one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmctx.datasets.assemble import RunData
from mmctx.datasets.view.render import render, write_page
from mmctx.eval.report import training
from mmctx.eval.report.attribution import attribution_section
from mmctx.eval.report.batch_drawing import count_batch, draw_batch
from mmctx.eval.report.charts import NUM_COLORS, draw_lines, short_number
from mmctx.eval.report.examples import example_sections
from mmctx.eval.report.pieces import Drawing, Part, Section, side_by_side
from mmctx.eval.report.run import Run, read_run
from mmctx.eval.report.sections import SECTIONS, plain_section
from mmctx.eval.report.sections.cells import percent
from mmctx.eval.report.settings import settings_section
from mmctx.pack import PackedBatch

if TYPE_CHECKING:
    from mmctx.train.config import RunConfig

_ELSEWHERE = ("loss", "attribution")
"""Suites that are shown with the losses of training, and with the documents that they are about."""
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class BatchToDraw:
    """A packed batch and the size of its bin."""

    batch: PackedBatch
    bin_tokens: int


def write_report(
    run_dir: Path, results: Mapping[str, Any], config: RunConfig, data: RunData, batch: PackedBatch | None = None
) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    Args:
        run_dir: also read: metrics.jsonl, skips*.jsonl and manifest.json, each where it exists.
        results: one entry of eval.json; the page leaves out suites that did not run.
        config: of the run.
        data: held-out data, to find the media of examples.
        batch: a packed batch to draw.

    Raises:
        MmctxError: jinja2 is not installed.
    """
    run = replace(read_run(run_dir, config.run.name, results), settings=config.model_dump(mode="json"))
    path = run_dir / "report.html"
    drawn = BatchToDraw(batch, config.data.bin_tokens) if batch else None
    write_page(path, render_page([run], {run.name: data}, drawn))
    return path


def render_page(runs: Sequence[Run], data: Mapping[str, RunData | None], batch: BatchToDraw | None = None) -> str:
    """The page as HTML.

    Args:
        runs: one, or several of different names.
        data: held-out data by the name of the run, to show the media of examples; None where they are not at hand.
        batch: a packed batch to draw.

    Raises:
        MmctxError: jinja2 is not installed.
    """
    sections = [section for section in _sections(runs, data, batch) if section is not None]
    return render(
        "report.html.jinja",
        folder=_TEMPLATES,
        filters={
            "short": _short,
            "percent": percent,
            "duration": _duration,
            "blocks": _blocks,
            "draw": draw_lines,
            "last_values": training.last_values,
            "not_finite": training.not_finite,
        },
        runs=runs,
        sections=sections,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        num_colors=NUM_COLORS,
        colors={run.name: f"s{number % NUM_COLORS}" for number, run in enumerate(runs)},
    )


def _sections(
    runs: Sequence[Run], data: Mapping[str, RunData | None], batch: BatchToDraw | None
) -> list[Section | None]:
    return [
        *_suite_sections(runs),
        _joined(runs, training.loss_section),
        _joined(runs, training.unusable_section),
        training.evaluations_section(runs),
        training.curves_section(runs),
        *example_sections(runs, data),
        attribution_section(runs, data),
        _batch_section(batch),
        _joined(runs, training.data_section),
        _joined(runs, training.skips_section),
        settings_section(runs),
    ]


def _suite_sections(runs: Sequence[Run]) -> list[Section | None]:
    """Suites that have a section come in the order of `SECTIONS`."""
    named = list(dict.fromkeys(suite for run in runs for suite in run.suites))
    order = [suite for suite in SECTIONS if suite in named]
    order += [suite for suite in named if suite not in SECTIONS and suite not in _ELSEWHERE]
    found = []
    for suite in order:
        sections = {run.name: _suite_section(suite, run) for run in runs}
        found.append(side_by_side(sections))
    return found


def _suite_section(suite: str, run: Run) -> Section | None:
    results = run.suites.get(suite)
    if not isinstance(results, Mapping) or not results:
        return None
    section = SECTIONS[suite](results) if suite in SECTIONS else plain_section(suite, results)
    if section is not None and suite in run.steps_of:
        about = f"{section.about} Found at step {run.steps_of[suite]:,}, not at the newest evaluation."
        section = replace(section, about=about)
    return section


def _joined(runs: Sequence[Run], make: Any) -> Section | None:
    return side_by_side({run.name: make(run) for run in runs})


def _batch_section(drawn: BatchToDraw | None) -> Section | None:
    if drawn is None:
        return None
    counts = count_batch(drawn.batch, drawn.bin_tokens)
    values = {"drawing": draw_batch(drawn.batch, drawn.bin_tokens), "counts": counts, "bin_tokens": drawn.bin_tokens}
    about = (
        f"A training batch is one flat sequence without padding, read row by row: {counts['documents']} documents of "
        f"{counts['samples']} samples, none of which sees another. Causal documents come first ({counts['causal']}), those that "
        "attend in both directions after them. Point at one for its key."
    )
    drawing = Drawing(name="batch", template="batch.html.jinja", values=values)
    return Section(id="batch", title="One packed batch", about=about, parts=(drawing,))


def _blocks(parts: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    """Neighbours that share a grid: charts of one size, heat maps; others stand alone."""

    def block(part: Part) -> str:
        wide = getattr(part, "wide", False)
        return "wide lines" if part.kind == "lines" and wide else part.kind

    return [(kind, list(found)) for kind, found in groupby(parts, block)]


def _short(value: Any) -> str:
    return short_number(value) if isinstance(value, int | float) else "–" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
