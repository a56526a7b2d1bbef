"""Draws recall's heat maps after each stage of a run: `python docs/images/recall_maps.py runs/long_recall`.

Writes `recall_needle.png` and `recall_picture.png` beside this file, from what `mmctx eval RUN --suite recall` found last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

TITLES = {"needle": "needles in text", "picture": "values of pictures"}


def draw(stages: Sequence[Mapping[str, Any]], kind: str, path: Path) -> None:
    """A map a stage: lengths to the right, depths downwards, the share of exact answers as colour and number."""
    figure, axes = plt.subplots(1, len(stages), figsize=(2.9 * len(stages), 2.7), sharey=True, layout="constrained")
    for axis, stage in zip(axes, stages, strict=True):
        heat = stage["heat"][kind]
        lengths, depths = list(heat), list(next(iter(heat.values())))
        values = [[heat[length][depth]["exact"] for length in lengths] for depth in depths]
        axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 0.55 else "black"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(stage["label"], fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths], fontsize=6)
        axis.set_yticks(range(len(depths)), depths, fontsize=7)
        axis.tick_params(length=0)
        axis.set_frame_on(False)
    axes[0].set_ylabel("depth", fontsize=8)
    figure.supxlabel("tokens of the document", fontsize=8)
    figure.suptitle(f"Recall of {TITLES[kind]}: exact answers, %", fontsize=10)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    run = Path(sys.argv[1])
    evaluations = json.loads((run / "eval.json").read_text())["evaluations"]
    found = [one["recall"]["stages"] for one in evaluations if "stages" in one.get("recall", {})]
    for kind in TITLES:
        draw(found[-1], kind, Path(__file__).with_name(f"recall_{kind}.png"))
