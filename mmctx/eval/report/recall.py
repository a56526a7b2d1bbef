"""The report's section on recall: a curve over lengths for each stage of the run, and tables of the newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmctx.eval.report.plots import short_number
from mmctx.eval.suites.recall import passes

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 10, 34
# Middle tones, on white and on black: from the first stage to the last.
_COLORS = ("#98a2b3", "#d6a343", "#e2733c", "#2f9e7a", "#4a8fe0", "#a066c9")


def recall_section(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page's template shows of the suite's results; None where there are none."""
    if not results.get("lengths"):
        return None
    lengths = results["lengths"]
    now = {"label": "this checkpoint", "lengths": {length: found["all"] for length, found in lengths.items()}}
    stages = results.get("stages") or [now]
    shown = [{**stage, "color": _COLORS[number % len(_COLORS)]} for number, stage in enumerate(stages)]
    chance = next(iter(lengths.values()))["all"]["chance"]
    kinds = [kind for kind in next(iter(lengths.values())) if kind not in ("all", "depths")]
    depths = list(dict.fromkeys(depth for found in lengths.values() for depth in found["depths"]))
    return {
        "svg": recall_chart(shown, chance),
        "stages": shown,
        "kinds": kinds,
        "rows": [
            {
                "length": int(length),
                "scores": [found.get(kind) for kind in ("all", *kinds)],
                "passes": passes(found["all"]),
            }
            for length, found in lengths.items()
        ],
        "depths": depths,
        "depth_rows": [
            {"length": int(length), "scores": [found["depths"].get(depth) for depth in depths]}
            for length, found in lengths.items()
        ],
        "controls": results.get("controls"),
    }


def recall_chart(stages: Sequence[Mapping[str, Any]], chance: float) -> str:
    """Share of exact answers over document length, as SVG: a line with 95% intervals for each stage, chance as a dashed line.

    Args:
        stages: each with `color` and `lengths`, a mapping of length to a score (see `recall.score`).
        chance: share that guessing reaches.
    """
    lengths = sorted({int(length) for stage in stages for length in stage["lengths"]})

    def at_x(length: str | int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (lengths.index(int(length)) + 0.5) / len(lengths)

    def at_y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = at_y(share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for length in lengths:
        x, y = at_x(length), _HEIGHT - _BOTTOM + 15
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{length:,}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">tokens of the document</text>'
    )
    y = at_y(chance)
    parts.append(f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for stage in stages:
        points = sorted((int(length), found) for length, found in stage["lengths"].items())
        line = " ".join(f"{at_x(length):.1f},{at_y(found['exact']):.1f}" for length, found in points)
        style = f'style="stroke:{escape(stage["color"])}"'
        parts.append(
            f'<polyline class="line" {style} points="{line}"><title>{escape(stage["label"])}</title></polyline>'
        )
        for length, found in points:
            x, low, high = at_x(length), at_y(found["low"]), at_y(found["high"])
            parts.append(f'<line {style} x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
            about = f"{stage['label']}, {length:,} tokens: {found['exact']:.1%} of {found['n']}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{at_y(found["exact"]):.1f}" r="3" fill="{escape(stage["color"])}">'
                f"<title>{escape(about)}</title></circle>"
            )
    label = f"Recall over {short_number(lengths[0])} to {short_number(lengths[-1])} tokens, {len(stages)} checkpoints"
    opening = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
    return opening + "".join(parts) + "</svg>"
