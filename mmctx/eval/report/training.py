"""Sections about how the runs trained: losses, curves, what their data were, what was skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmctx.eval.report.charts import short_number
from mmctx.eval.report.pieces import Cell, Drawing, Lines, Row, Section, Series, Table
from mmctx.eval.report.run import Column, Run

LAST_LINES = 3
_CURVES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "mfu": "model FLOPs utilisation",
    "fill": "share of bins filled",
    "data_wait": "share of time waiting for data",
    "peak_memory": "peak memory, bytes",
}
"""Columns of metrics.jsonl that are drawn below the losses."""
_STEADY = {"lr", "peak_memory"}
"""Those that have corners, not noise."""
_MAX_EVALUATIONS = 48


def loss_section(run: Run) -> Section | None:
    """Where each objective's loss started, where it ended, and what it is on held-out data."""
    summary = summarise_losses(run)
    if not summary:
        return None
    columns = {"first": "first", "last": "last", "held_out": "held out", "n": "n"}
    rows = tuple(
        Row(name, tuple(_loss_cell(column, found.get(column)) for column in columns)) for name, found in summary.items()
    )
    return Section(
        id="loss",
        title="Losses",
        about="Mean loss per prediction of each objective: the first logged value, the mean of the last three, and over the held-out data.",
        parts=(Table(name="losses", corner="objective", columns=tuple(columns.values()), rows=rows),),
    )


def _loss_cell(column: str, value: float | None) -> Cell | None:
    if value is None:
        return None
    return Cell(text=f"{value:,}" if column == "n" else f"{value:.3f}")


def summarise_losses(run: Run) -> dict[str, dict[str, float]]:
    """`{objective: {"first", "last", "held_out", "n"}}`: `first` is the first logged value, `last` the mean of the last three, since single
    values are noisy. Lines that hold none (no prediction in the interval) do not count; without metrics only held-out values remain.
    """
    held_out = run.results.get("loss") or {}
    trained = {name.removeprefix("loss/"): column for name, column in run.columns.items() if name.startswith("loss/")}
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*trained, *held_out]):
        values = trained[name].values if name in trained else np.zeros(0)
        ends = {"first": float(values[0]), "last": float(np.mean(values[-LAST_LINES:]))} if len(values) else {}
        summary[name] = {**ends, **held_out.get(name, {})}
    return summary


def curves_section(runs: Sequence[Run]) -> Section | None:
    """Losses, then how training went, a line for each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.columns))
    losses = [name for name in names if name.startswith("loss/")]
    if len(losses) > 1:
        losses = ["loss", *losses]
    labels = {name: "total, weighted" if name == "loss" else name.removeprefix("loss/") for name in losses} | _CURVES
    parts = []
    for name, label in labels.items():
        held_out = (runs[0].results.get("loss") or {}).get(label, {}).get("held_out") if len(runs) == 1 else None
        reference = held_out if name.startswith("loss/") else None
        columns = {run.name: run.columns.get(name) for run in runs}
        parts += _chart(name, label, columns, reference=reference, smooth=name not in _STEADY)
    if not parts:
        return None
    return Section(
        id="curves",
        title="Training curves",
        about="From metrics.jsonl, over optimizer steps. The strong line is a moving average; pale behind it are the values, or the "
        "range of those that one point stands for.",
        parts=tuple(parts),
    )


def evaluations_section(runs: Sequence[Run]) -> Section | None:
    """Evaluation numbers that were found at several steps."""
    names = list(
        dict.fromkeys(name for run in runs for name, column in run.evaluations.items() if len(column.steps) > 1)
    )
    parts = []
    for name in names[:_MAX_EVALUATIONS]:
        suite, _, rest = name.partition("/")
        columns = {run.name: run.evaluations.get(name) for run in runs}
        parts += _chart(name, f"{suite}: {rest.replace('_', ' ')}", columns, dots=True)
    if not parts:
        return None
    more = (
        f" {len(names) - _MAX_EVALUATIONS} more numbers are in metrics.jsonl." if len(names) > _MAX_EVALUATIONS else ""
    )
    return Section(
        id="evaluations",
        title="Evaluations over steps",
        about=f"Headline numbers of the suites that ran inside training and at its end.{more}",
        parts=tuple(parts),
    )


def _chart(
    name: str,
    label: str,
    columns: Mapping[str, Column | None],
    *,
    reference: float | None = None,
    smooth: bool = False,
    dots: bool = False,
) -> list[Lines]:
    """A chart of one column of each run; none where no value is finite."""
    several = len(columns) > 1
    series = [
        Series(label=run if several else "", x=c.steps if c else (), y=c.values if c else (), smooth=smooth, dots=dots)
        for run, c in columns.items()
    ]
    if not any(np.isfinite(column.values).any() for column in columns.values() if column is not None):
        return []
    lines = Lines(name=name, label=label, series=tuple(series), reference=reference, reference_label="held out")
    return [lines]


def last_values(chart: Lines) -> list[str]:
    """Beside a chart: for each series the mean of its last three finite values."""
    found = []
    for series in chart.series:
        end = [value for value in list(series.y)[-10 * LAST_LINES :] if value is not None and math.isfinite(value)][
            -LAST_LINES:
        ]
        found.append(short_number(sum(end) / len(end)) if end else "–")
    return found


def not_finite(chart: Lines) -> int:
    """Values of a chart that are NaN or infinite."""
    return sum(1 for series in chart.series for value in series.y if value is not None and not math.isfinite(value))


def data_section(run: Run) -> Section | None:
    """How many tokens of what a run was fed, how full its bins were and how long it waited for them."""
    newest = {name: float(column.values[-1]) for name, column in run.columns.items() if len(column.values)}
    if "tokens" not in newest:
        return None
    total = newest["tokens"]
    rows = [
        Row(f"tokens of {name.removeprefix('tokens/')}", (Cell(text=short_number(n), share=n / total if total else 0),))
        for name, n in newest.items()
        if name.startswith("tokens/")
    ]
    rows.append(Row("tokens, all", (Cell(text=short_number(total)),)))
    if "samples" in newest:
        rows.append(Row("samples", (Cell(text=f"{newest['samples']:,.0f}"),)))
    for name, label in (("fill", "bins filled, mean"), ("data_wait", "waiting for data, mean")):
        if name in run.columns:
            mean = float(np.mean(run.columns[name].values))
            rows.append(Row(label, (Cell(text=f"{100 * mean:.1f}%", share=mean),)))
    skipped = newest.get("skipped")
    if skipped is not None:
        rows.append(Row("samples skipped", (Cell(text=f"{skipped:,.0f}"),)))
    return Section(
        id="data",
        title="Data",
        about="What the run was fed up to its newest line of metrics, how full its bins were, and how long it waited for them.",
        parts=(Table(name="data", corner="", columns=("",), rows=tuple(rows)),),
    )


def unusable_section(run: Run) -> Section | None:
    """Held-out samples that no suite could use."""
    if not run.results.get("skipped"):
        return None
    rows = tuple(Row(reason, (Cell(text=f"{count:,}"),)) for reason, count in run.results["skipped"].items())
    return Section(
        id="skipped",
        title="Held-out samples that could not be used",
        about="They are left out of all results above.",
        parts=(Table(name="skipped", corner="reason", columns=("samples",), rows=rows),),
    )


def skips_section(run: Run) -> Section | None:
    """The ledger of training."""
    if run.skips is None:
        return None
    drawing = Drawing(name=f"skips {run.name}", template="skips.html.jinja", values={"run": run.name, **run.skips})
    about = "Lines of skips.jsonl by reason, with the first few of each. Step 0 means: ruled out before training."
    return Section(id="skips", title="Skipped samples", about=about, parts=(drawing,))
