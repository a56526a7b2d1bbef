"""Segments of a run's plan: a change of mix, context or bins, made by resuming with another configuration, begins a new one.

Each is recorded in the checkpoint with where it starts, so that every step of a run can be found again, whatever was changed on the way.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.config import DataConfig
from mmctx.datasets.planning.plan import Plan, Start
from mmctx.errors import CheckpointError, DataError
from mmctx.train.config import RunConfig

SEGMENTS = "segments.json"
"""File of a run folder that lists its segments."""

NO_CHANGE_OF_PLAN = (
    "num_workers",
    "prefetch",
    "worker_timeout",
    "cache_mb",
    "remote_cache_dir",
    "remote_cache_gb",
    "skip_budget",
    "tokenizer",
    "quarantine",
)
"""Keys of `data` that no batch depends on, and files that are known by their content, as shards are."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a run under one data configuration.

    Attributes:
        start: where it takes over.
        data: its configuration.
        fingerprints: content of the tokenizer and of each source, see `RunData.fingerprints`.
        windows: of the trunk's layers, which bins are evened out by.
        quarantine: fingerprint of what the quarantine file lists.
    """

    start: Start
    data: DataConfig
    fingerprints: Mapping[str, str]
    windows: tuple[int | None, ...]
    quarantine: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `trainer_state.json`."""
        return {
            "start": asdict(self.start),
            "data": self.data.model_dump(mode="json"),
            "fingerprints": dict(self.fingerprints),
            "windows": list(self.windows),
            "quarantine": self.quarantine,
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: str) -> Segment:
        """What `to_json` gave."""
        start = Start(
            step=tree["start"]["step"],
            drawn=tree["start"]["drawn"],
            carried=tuple((name, sample, epoch) for name, sample, epoch in tree["start"]["carried"]),
        )
        data = build_config(DataConfig, tree["data"], where)
        return cls(start, data, tree["fingerprints"], tuple(tree["windows"]), tree["quarantine"])


def continue_segments(
    earlier: list[Segment], step: int, config: RunConfig, data: RunData, where: str, say: Callable[[str], None]
) -> list[Segment]:
    """The segments of a run that goes on at `step` under `config`: the earlier ones, and a new one where the plan would change.

    Raises:
        CheckpointError: the tokenizer or the shards of a source are not those that the run has read so far.
    """
    windows = config.model.transformer.windows
    now = Segment(Start(), config.data, data.fingerprints, windows, data.quarantine.fingerprint)
    if not earlier:
        return [now]
    last = earlier[-1]
    known = {name: content for segment in earlier for name, content in segment.fingerprints.items()}
    _check_content(known, now.fingerprints, where)  # of sources that went and come back, too
    changes = _changes(last, now)
    if not changes:
        return earlier
    say(f"the data changed: a new segment of the plan begins at step {step}")
    for change in changes:
        say(f"  {change}")
    return [*earlier, replace(now, start=_take_over(last, step, config, data, say))]


def segment_of(segments: list[Segment], step: int) -> Segment:
    """The segment that global step `step` (counted from 0) belongs to."""
    return [segment for segment in segments if segment.start.step <= step][-1]


def open_segment(segment: Segment, config: RunConfig) -> tuple[RunData, Plan]:
    """Data and plan of a segment, read from where `config` says that files lie now.

    Raises:
        CheckpointError: the tokenizer, shards or quarantine list are not those that the segment was made with.
    """
    here = _at_new_places(segment.data, config.data)
    if (kept := kept_quarantine(config, segment.quarantine)).exists():
        here = here.model_copy(update={"quarantine": str(kept)})
    trunk = config.model.transformer.model_copy(update={"windows": segment.windows})
    model = config.model.model_copy(update={"transformer": trunk})
    data = build_data(here, here.sources, model, config.objectives, config.train.seed)
    where = f"the part of the run from step {segment.start.step}"
    _check_content(segment.fingerprints, data.fingerprints, where)
    if segment.quarantine not in ("", data.quarantine.fingerprint):
        raise CheckpointError(
            f"data.quarantine={here.quarantine}: it lists other samples ({data.quarantine.fingerprint}) than in {where} "
            f"({segment.quarantine}); restore that list as {kept}"
        )
    return data, Plan(here, data.tables, config.train.seed, segment.start)


def kept_quarantine(config: RunConfig, fingerprint: str) -> Path:
    """Where a run keeps a list that it has used, so that its steps can be found again when the list is written anew."""
    return Path(config.run.dir) / config.run.name / f"quarantine-{fingerprint}.jsonl"


def _at_new_places(data: DataConfig, now: DataConfig) -> DataConfig:
    """`data` with the paths and the loading of `now`; a source that is gone keeps its old path."""
    sources = {
        name: source.model_copy(update={"shards": now.sources[name].shards}) if name in now.sources else source
        for name, source in data.sources.items()
    }
    moved = {key: getattr(now, key) for key in NO_CHANGE_OF_PLAN if key != "quarantine"}
    return data.model_copy(update=moved | {"sources": sources})


def _check_content(before: Mapping[str, str], now: Mapping[str, str], where: str) -> None:
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            what = f"data.sources.{name}: its shards have" if name else "data.tokenizer: it has"
            raise CheckpointError(
                f"{what} fingerprint {now[name]}, in {where} {before[name]}: the same steps would read other samples. "
                "Restore them, add new shards as a source of their own, or set run.name to start a new run."
            )


def _changes(before: Segment, now: Segment) -> list[str]:
    """Lines that tell which keys differ, of those that a batch depends on."""
    a, b = _planned(before.data), _planned(now.data)
    lines = [f"data.{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if before.windows != now.windows:
        lines.append(f"model.transformer.windows: {before.windows} -> {now.windows}")
    if before.quarantine != now.quarantine:
        lines.append(f"data.quarantine: its content was {before.quarantine}, is {now.quarantine}")
    return lines


def _planned(data: DataConfig) -> dict[str, Any]:
    tree = data.model_dump(mode="json", exclude=set(NO_CHANGE_OF_PLAN))
    flat = {key: value for key, value in tree.items() if key != "sources"}
    for name, source in tree["sources"].items():
        flat |= {f"sources.{name}.{key}": value for key, value in source.items() if key != "shards"}
    return flat


def _take_over(last: Segment, step: int, config: RunConfig, data: RunData, say: Callable[[str], None]) -> Start:
    """Where a new segment begins: samples that the last one drew and did not read come first, then each source goes on in its epoch.

    A new pass over all sources begins instead where they have no weights and are not the same as before, where weights came or went, and
    where blocks are others: an epoch cannot go on in another order.
    """
    before, plan = open_segment(last, config)
    drawn = plan.draws(step - last.start.step)
    if begun := count_begun(plan, step):
        say(
            f"  {begun} parts of documents that were split and read in part stay unread: other sizes would cut them elsewhere"
        )
    sizes, sizes_before = _packed_sizes(data), _packed_sizes(before)
    is_weighted = any(source.weight is not None for source in data.config.sources.values())
    streamed = {name: drawn[name] for name in last.data.streamed}
    if plan.streams is not None:
        say("  documents that are streamed begin a new pass, with nothing carried: what was left of them stays unread")
    same_order = all(getattr(last.data, key) == getattr(data.config, key) for key in ("block_size", "blocks_in_flight"))
    if same_order and plan.is_weighted and is_weighted:
        return Start(step, {**last.start.drawn, **drawn}, unread(plan, step))  # a source that went may come back
    if same_order and not plan.is_weighted and not is_weighted and sizes_before == sizes:
        return Start(step, drawn, unread(plan, step))
    say("  so a new pass over all sources begins: what the last one had not read is left unread")
    passes = max(
        (
            ceil(count / (sizes_before[name] if name else sum(sizes_before.values())))
            for name, count in drawn.items()
            if name not in streamed
        ),
        default=0,
    )
    if is_weighted:
        return Start(step, {name: passes * size for name, size in sizes.items()} | streamed)
    return Start(step, {"": passes * sum(sizes.values())} | streamed)


def _packed_sizes(data: RunData) -> dict[str, int]:
    """Samples of each source that is not streamed."""
    return {name: table.num_samples for name, table in data.tables.items() if not table.is_stream}


def unread(plan: Plan, step: int) -> tuple[tuple[str, int, int], ...]:
    """(source name, sample id, epoch) of samples that were drawn for steps before the end of the window of `step`, or carried over by the
    plan, and that no step before `step` read a part of or wrote down as left out.
    """
    window, place = divmod(step - plan.start.step, plan.window_steps)
    if place == 0:
        return plan.waiting(window)
    first = step - place
    read = _units(plan, range(first, step))
    told = Counter(entry[:2] for number in range(first, step) for bin in plan.step(number) for entry in bin.left_out)
    left = []
    for source, sample, epoch in zip(*(column.tolist() for column in plan.drawn_by(window)), strict=True):
        if told[source, sample]:  # a window may draw it in several epochs: it is told of as often
            told[source, sample] -= 1
        elif (source, sample, epoch) not in read:
            left.append((plan.names[source], sample, epoch))
    return tuple(left) + plan.waiting(window + 1)


def count_begun(plan: Plan, step: int) -> int:
    """Parts of split documents that steps from `step` to the end of its window would have read, of which earlier steps read other parts."""
    place = (step - plan.start.step) % plan.window_steps
    read = _units(plan, range(step - place, step))
    rest = range(step, step - place + plan.window_steps) if place else ()
    return sum(sample[:3] in read for later in rest for bin in plan.step(later) for sample in bin.samples)


def _units(plan: Plan, steps: Iterable[int]) -> set[tuple[int, int, int]]:
    """(source number, sample id, epoch) that some steps read."""
    return {sample[:3] for step in steps for bin in plan.step(step) for sample in bin.samples}


def write_segments(run_dir: Path, trees: list[Any]) -> None:
    """Puts the segments beside the metrics: a line may be written, and replayed, before the next checkpoint."""
    fresh = run_dir / ".segments.json"
    fresh.write_text(json.dumps(trees))
    os.replace(fresh, run_dir / SEGMENTS)


def read_segments(trees: list[Any], where: str) -> list[Segment]:
    """The segments that a checkpoint records.

    Raises:
        CheckpointError: it records none: it was written by an earlier version.
    """
    if not trees:
        raise CheckpointError(
            f"{where} records no plan: an older mmctx wrote it and planned otherwise; set run.name to start a new run"
        )
    try:
        return [Segment.from_json(tree, where) for tree in trees]
    except (KeyError, TypeError, ValueError, DataError) as error:
        raise CheckpointError(f"{where}: its segments cannot be read ({error!r})") from None
