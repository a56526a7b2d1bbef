"""The report of a run: `report.html`, one file that needs no network."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmctx.errors import MmctxError
from mmctx.eval.report.batch_drawing import count_batch, draw_batch
from mmctx.eval.report.examples import load_examples
from mmctx.eval.report.plots import line_chart, short_number
from mmctx.eval.report.recall import recall_section
from mmctx.jsonl import read_lines
from mmctx.pack import MODALITIES, PackedBatch

if TYPE_CHECKING:  # only the command line and the API import the training side
    from mmctx.datasets.assemble import RunData
    from mmctx.train.config import RunConfig

_LAST_LINES = 3
_SKIPS_SHOWN = 3
_KNOWN_PARTS = ("loss", "retrieval", "caption", "masked_lm", "recall", "skipped")
_RECALL = re.compile(r"R@(\d+)")

# Columns of metrics.jsonl that are drawn below the losses.
_PROCESS_CURVES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "data_wait": "share of time waiting",
}


def summarise_losses(run_dir: Path, held_out: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Where each objective's loss started, where it ended and what it is on held-out data.

    Args:
        run_dir: holds metrics.jsonl; without one only the held-out values remain.
        held_out: results of the suite `loss`.

    Returns:
        `{objective: {"first", "last", "held_out", "n"}}`: `first` is the first logged value, `last` the mean of the last
        three, since single values are noisy. Lines that hold none (no prediction in the interval) do not count.
    """
    series: dict[str, list[float]] = {}
    for line in read_lines(run_dir / "metrics.jsonl"):
        for name, value in line.items():
            if name.startswith("loss/") and value is not None:
                series.setdefault(name.removeprefix("loss/"), []).append(value)
    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys([*series, *held_out]):
        values = series.get(name, [])
        end = values[-_LAST_LINES:]
        trained = {"first": values[0], "last": sum(end) / len(end)} if values else {}
        summary[name] = {**trained, **held_out.get(name, {})}
    return summary


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
    losses = summarise_losses(run_dir, results.get("loss", {}))
    path = run_dir / "report.html"
    examples = load_examples(results.get("caption", {}).get("examples", ()), data)
    page = _render(
        name=config.run.name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        results=results,
        manifest=_manifest(run_dir),
        retrieval=_retrieval_table(results.get("retrieval", {})),
        captions=_caption_table(results.get("caption", {})),
        masked_lm=results.get("masked_lm"),
        recall=recall_section(results.get("recall", {})),
        loss=losses,
        skipped=results.get("skipped"),
        other={name: part for name, part in results.items() if isinstance(part, dict) and name not in _KNOWN_PARTS},
        losses=_loss_curves(run_dir, losses),
        process=_process_curves(run_dir),
        examples=examples,
        drawing=draw_batch(batch, config.data.bin_tokens) if batch else None,
        counts=count_batch(batch, config.data.bin_tokens) if batch else None,
        bin_tokens=config.data.bin_tokens,
        skips=_skips(run_dir),
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )
    _write(path, page)
    return path


def _render(**values: Any) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MmctxError("the report needs jinja2: pip install 'mmctx[eval]'") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # keys and texts come from data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "short": _short, "duration": _duration}
    return environment.get_template("report.html.jinja").render(**values)


def _retrieval_table(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a direction; each metric with what a random ranking of n candidates would reach."""
    rows = []
    for direction, scores in results.items():
        n = int(scores["n"])
        chance = scores.get("chance", {})
        cells = [
            {"name": name, "value": scores[name], "chance": chance.get(name, _chance(name, n))}
            for name in ("R@1", "R@5", "R@10", "MRR")
        ]
        rows.append({"direction": direction.replace("_to_", " → "), "n": n, "cells": cells})
    return rows


def _chance(metric: str, n: int) -> float:
    recall = _RECALL.fullmatch(metric)
    if recall:
        return min(int(recall[1]) / n, 1.0)
    return sum(1 / rank for rank in range(1, n + 1)) / n  # mean reciprocal of a rank that is uniform in 1..n


def _caption_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"kind": kind, **{name: results[f"{kind}_{name}"] for name in ("cer", "wer", "exact", "n")}}
        for kind in MODALITIES
        if f"{kind}_n" in results
    ]


def _loss_curves(run_dir: Path, summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The total, then each objective with its held-out loss as a dashed line."""
    lines = read_lines(run_dir / "metrics.jsonl")
    names = list(dict.fromkeys(name for line in lines for name in line if name.startswith("loss/")))
    held_out = {name: summary.get(name.removeprefix("loss/"), {}).get("held_out") for name in names}
    total = [_curve(lines, "loss", "total, weighted")] if len(names) > 1 else []
    return [c for c in total + [_curve(lines, name, name.removeprefix("loss/"), held_out[name]) for name in names] if c]


def _process_curves(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_lines(run_dir / "metrics.jsonl")
    return [curve for name, label in _PROCESS_CURVES.items() if (curve := _curve(lines, name, label))]


def _curve(
    lines: Sequence[Mapping[str, Any]], column: str, label: str, reference: float | None = None
) -> dict[str, Any] | None:
    """A chart with its label, the last value, the dashed line's value and how many values were not finite."""
    points = [(line["step"], line[column]) for line in lines if line.get(column) is not None]
    finite = [value for _, value in points if math.isfinite(value)]
    if not finite:
        return None
    steps, values = [step for step, _ in points], [value for _, value in points]
    end = finite[-_LAST_LINES:]
    return {
        "label": label,
        "last": sum(end) / len(end),
        "reference": reference,
        "not_finite": len(points) - len(finite),
        "svg": line_chart(label, steps, values, reference, smooth=column != "lr"),  # a schedule has corners, no noise
    }


def _skips(run_dir: Path) -> dict[str, Any] | None:
    """Counts by reason with the first few samples, over the ledgers of all ranks; None where there is no ledger."""
    paths = sorted(run_dir.glob("skips*.jsonl"))
    if not paths:
        return None
    reasons: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        for line in read_lines(path):
            if "event" in line:  # of a whole step, not of a sample
                continue
            reasons.setdefault(line["reason"], []).append(line)
    groups = [
        {
            "reason": reason,
            "count": len(found),
            "first": [{**line, "shard": Path(line["shard"]).name} for line in found[:_SKIPS_SHOWN]],
        }
        for reason, found in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    return {"total": sum(group["count"] for group in groups), "groups": groups}


def _manifest(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader never meets half of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _short(value: Any) -> str:
    return short_number(value) if isinstance(value, int | float) else "–" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
