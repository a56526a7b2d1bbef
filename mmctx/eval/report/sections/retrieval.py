"""Section of the suite `retrieval`: a row for each direction, and for each source where there are several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Cell, Row, Section, Table
from mmctx.eval.report.sections.cells import count_cell, percent, share_cell

_RECALL = re.compile(r"R@(\d+)")


def retrieval_section(results: Mapping[str, Any]) -> Section | None:
    """R@k and mean reciprocal rank, each with what a random ranking of the candidates would reach."""
    directions = {name: scores for name, scores in results.items() if isinstance(scores, Mapping) and scores.get("n")}
    if not directions:
        return None
    rankings = {
        f"{direction.replace('_to_', ' → ')}{within}": scores
        for direction, whole in directions.items()
        for within, scores in {
            "": whole,
            **{f" in {source}": found for source, found in whole.get("by_source", {}).items()},
        }.items()
    }
    metrics = [name for name in next(iter(directions.values())) if name == "MRR" or _RECALL.fullmatch(name)]
    counts = ["n", *(["candidates"] if any("candidates" in scores for scores in directions.values()) else [])]
    rows = []
    for label, scores in rankings.items():
        cells = [_cell(name, scores) for name in metrics] + [count_cell(scores.get(name)) for name in counts]
        rows.append(Row(label, tuple(cells)))
    table = Table(name="directions", corner="direction", columns=(*metrics, *counts), rows=tuple(rows))
    return Section(
        id="retrieval",
        title="Retrieval",
        about="Does the embedding of one view find its partner among all held-out candidates? R@k is the share of the n queries "
        "whose partner ranks among the first k, MRR the mean of one over its rank; the tick in each bar is what a random ranking reaches.",
        parts=(table,),
    )


def _cell(metric: str, scores: Mapping[str, Any]) -> Cell | None:
    low, high = scores.get("interval", {}).get(metric, (None, None))
    about = "" if low is None else f"95% interval {percent(low)} to {percent(high)}"
    known = scores.get("chance", {}).get(metric)
    return share_cell(scores.get(metric), chance(metric, int(scores["n"])) if known is None else known, about=about)


def chance(metric: str, n: int) -> float:
    """What a random ranking of n candidates with one partner among them reaches."""
    recall = _RECALL.fullmatch(metric)
    if recall:
        return min(int(recall[1]) / n, 1.0)
    return sum(1 / rank for rank in range(1, n + 1)) / n  # mean reciprocal of a rank that is uniform in 1..n
