"""Section of the suite `robustness`: a curve over severity for every corruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Lines, Section, Series


def robustness_section(results: Mapping[str, Any]) -> Section | None:
    """A chart for each modality, task and direction, a line for each corruption; severity 0 is clean."""
    severities = results.get("severities") or []
    charts: dict[tuple[str, str], list[tuple[str, list[float]]]] = {}
    chances: dict[tuple[str, str], float] = {}
    for corruption, directions in (results.get("retrieval") or {}).items():
        modality, _, name = corruption.partition("/")
        for direction, scores in directions.items():
            place = (modality, f"{direction.replace('_to_', ' → ')}, R@1")
            charts.setdefault(place, []).append((name, scores["R@1"]))
            chances[place] = scores.get("chance")
    for corruption, found in (results.get("captioning") or {}).items():
        modality, _, name = corruption.partition("/")
        charts.setdefault((modality, "caption loss, nats a token"), []).append((name, found["loss"]))
    parts = [
        Lines(
            name=f"{modality} {task}",
            label=f"{modality}: {task}",
            series=tuple(Series(label=name, x=severities, y=y, dots=True) for name, y in curves),
            x_label="severity",
            reference=chances.get((modality, task)),
            reference_label="chance",
            share=task.endswith("R@1"),
        )
        for (modality, task), curves in charts.items()
    ]
    if not parts or not severities:
        return None
    return Section(
        id="robustness",
        title="Robustness",
        about="What is left when pictures, sounds and texts are damaged, more from severity to severity; 0 is clean.",
        parts=tuple(parts),
    )
