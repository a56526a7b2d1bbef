"""Which checkpoints of a run stay: the last ones, every so many steps, the best by a metric, the ends of stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmctx.config import StrictModel
from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.layout import list_checkpoints, step_of
from mmctx.train.checkpoints.manifest import about


class BestConfig(StrictModel):
    """The best checkpoints by a number of metrics.jsonl, from the line of their step."""

    metric: str = "loss"
    """Key of metrics.jsonl, such as `loss` or `loss/captioning`."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    count: int = Field(default=1, ge=1)
    """How many of them."""


class KeepConfig(StrictModel):
    """Checkpoints that stay; others are deleted. What a stage of a schedule ended with stays in any case."""

    last: int = Field(default=2, ge=1)
    """The newest ones."""
    every: int | None = Field(default=None, ge=1)
    """Those of steps that are a multiple of this."""
    best: BestConfig | None = None
    """The best ones by a metric."""


def superfluous(run_dir: Path, keep: KeepConfig, now: int, ends: Iterable[int] = ()) -> list[Path]:
    """Checkpoints that may go once the one after `now` steps is whole.

    Newer ones are left alone: they are damaged, or the run would have gone on from there, and it will write them again.

    Args:
        run_dir: the run's folder.
        keep: what stays.
        now: steps of the newest one that counts.
        ends: steps at which stages end: these stay and do not count.
    """
    found = {step: path for path in list_checkpoints(run_dir) if (step := step_of(path)) <= now}
    ends = set(ends)
    kept = ends | set(sorted(found.keys() - ends)[-keep.last :])
    if keep.every is not None:
        kept |= {step for step in found if step % keep.every == 0}
    if keep.best is not None:
        values = {step: about(path).get("metrics", {}).get(keep.best.metric) for step, path in found.items()}
        known = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}
        sign = {"min": 1, "max": -1}[keep.best.mode]
        kept |= set(sorted(known, key=lambda step: (sign * known[step], -step))[: keep.best.count])
    return [path for step, path in found.items() if step not in kept]


def check_metric(keep: KeepConfig, line: Mapping[str, Any]) -> None:
    """Looks for the metric of `keep.best` in a line of metrics.jsonl.

    Raises:
        CheckpointError: it is not there, or it is no number.
    """
    if keep.best is None or not line:
        return
    numbers = [key for key, value in line.items() if value is None or isinstance(value, int | float)]
    if keep.best.metric not in numbers:
        raise CheckpointError(
            f"train.keep.best.metric={keep.best.metric!r} is no number of metrics.jsonl; it has {', '.join(numbers)}"
        )
