"""Any step of a run, rebuilt: `mmctx replay`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mmctx.config import load_config
from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.errors import ConfigError
from mmctx.fingerprint import bin_fingerprint, combine, show
from mmctx.jsonl import read_lines
from mmctx.pack import PackedBatch
from mmctx.train.config import RunConfig, RunInfo
from mmctx.train.course import plan_at
from mmctx.train.segments import NO_CHANGE_OF_PLAN, SEGMENTS, open_segment, read_segments, segment_of


@dataclass(frozen=True)
class GlobalBatch:
    """What one step read.

    Attributes:
        step: counted from 1, as in `metrics.jsonl`.
        data: of the segment that the step belongs to.
        bins: as planned.
        batches: as fed to the model, one for each bin.
    """

    step: int
    data: RunData
    bins: list[Bin]
    batches: list[PackedBatch]

    @property
    def fingerprint(self) -> str:
        """As in `metrics.jsonl`."""
        return show(combine(bin_fingerprint(number, batch) for number, batch in enumerate(self.batches)))


def replay(where: Path, step: int, overrides: tuple[str, ...] = ()) -> GlobalBatch:
    """The global batch of a step, from a run folder (with the segments that it records) or a configuration.

    Args:
        where: a run folder, or a YAML file.
        step: counted from 1: the batch that led to line `step` of `metrics.jsonl`.
        overrides: changes of a configuration, such as `data.cache_mb=0`.

    Raises:
        ConfigError: `step` is less than 1.
        CheckpointError: what the run has read then is no longer there.
    """
    if step < 1:
        raise ConfigError(f"--step counts from 1, as in metrics.jsonl, found {step}")
    is_run = where.is_dir()
    if not where.exists():
        raise ConfigError(f"{where}: neither a run folder nor a run's YAML file")
    if is_run and (planned := [o for o in overrides if not _changes_no_batch(o)]):
        raise ConfigError(
            f"{where} has read what it has read: {planned[0]!r} would change it; give the YAML file to see what if"
        )
    config = load_config(RunConfig, where / "config.yaml" if is_run else where, overrides)
    if is_run:  # wherever it has been moved to
        home = where.resolve()
        config = config.model_copy(update={"run": RunInfo(name=home.name, dir=str(home.parent))})
    if is_run and (where / SEGMENTS).exists():
        segments = read_segments(json.loads((where / SEGMENTS).read_text()), str(where / SEGMENTS))
        data, plan = open_segment(segment_of(segments, step - 1), config)
    else:
        data, plan = plan_at(config, step - 1, str(where))
    bins = plan.step(step - 1)
    return GlobalBatch(step, data, bins, [data.dataset[bin] for bin in bins])


def _changes_no_batch(override: str) -> bool:
    key = override.partition("=")[0]
    return key in {f"data.{name}" for name in NO_CHANGE_OF_PLAN} or fnmatch(key, "data.sources.*.shards")


def recorded_fingerprint(run_dir: Path, step: int) -> str | None:
    """What `metrics.jsonl` says of a step, None where it has no line of it."""
    lines = {line["step"]: line.get("batch_fingerprint") for line in read_lines(run_dir / "metrics.jsonl")}
    return lines.get(step)
