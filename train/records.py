"""What a run leaves behind while it goes: metrics.jsonl, skips.jsonl, a progress bar."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from mmctx.attention.resolve import Resolution
from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Plan
from mmctx.errors import SkipBudgetError
from mmctx.jsonl import read_lines
from mmctx.model import MmctxModel, count_parameters
from mmctx.pack import PackedBatch
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.config import RunConfig
from mmctx.train.trackers import Trackers


class JsonLines:
    """A file of one JSON object a line, continued after a restart from the step that the checkpoint held.

    Args:
        path: the file.
        last_step: lines of later steps are dropped: they will be written again.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        trim(path, last_step)
        self._file: TextIO = path.open("a")

    def write(self, lines: Iterable[dict[str, Any]]) -> None:
        """Appends lines and hands them to the system at once, so that a killed run keeps them."""
        for line in lines:
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def trim(path: Path, last_step: int) -> None:
    """Drops the lines of later steps; a kill in between leaves either the old file or the new one."""
    kept = [line for line in read_lines(path) if line["step"] <= last_step]
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(fresh, path)


class Metrics:
    """metrics.jsonl, and the same numbers for the trackers.

    Args:
        run_dir: the run's folder.
        last_step: as in `JsonLines`.
        config: of the run.
    """

    def __init__(self, run_dir: Path, last_step: int, config: RunConfig) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl", last_step)
        self._trackers = Trackers(config.train.trackers, run_dir, last_step, config.model_dump(mode="json"))

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line; it must hold `step`."""
        self._lines.write([line])
        self._trackers.log(line)

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._trackers.close()


class SkipLedger:
    """Writes every skipped sample down and stops the run when there are too many.

    Args:
        path: skips.jsonl, one for each rank.
        budget: largest share of samples that may be skipped.
        last_step: as in `JsonLines`.
    """

    GRACE = 200  # samples seen before the share means anything

    def __init__(self, path: Path, budget: float, last_step: int) -> None:
        self._lines, self.budget = JsonLines(path, last_step), budget
        self._by_shard: Counter[str] = Counter()

    def record(self, batches: Sequence[PackedBatch], step: int) -> None:
        """Writes down what was skipped, and what the plan left out: only the first counts towards the budget.

        Samples of another length than their source reads are nobody's loss: they are counted alone.
        """
        for batch in batches:
            self._lines.write({"step": step, "planned": False, **asdict(skip)} for skip in batch.skips)
            self._lines.write(
                {"step": step, "planned": True, **asdict(skip)}
                for skip in batch.left_out
                if skip.reason != "other_length"
            )
            self._by_shard.update(skip.shard for skip in batch.skips)

    def write_event(self, line: dict[str, Any]) -> None:
        """Writes down what befell a whole step; it holds `step` and `event`."""
        self._lines.write([line])

    def check(self, skipped: int, samples: int) -> None:
        """Raises SkipBudgetError when more than the budget of the samples seen so far were skipped."""
        if skipped > self.budget * max(samples, self.GRACE):
            worst = ", ".join(f"{shard} ({count})" for shard, count in self._by_shard.most_common(3))
            raise SkipBudgetError(
                f"{skipped} of {samples} samples were skipped, more than data.skip_budget={self.budget} allows; most in {worst}. "
                "See skips.jsonl for every key and reason; mend the shards or raise the budget."
            )

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def open_ledger(run_dir: Path, budget: float, last_step: int, accelerator: Accelerator) -> SkipLedger:
    """The ledger of this rank; those of ranks of earlier sittings are set back to the checkpoint as well."""
    rank = accelerator.process_index
    if accelerator.is_main_process:
        for path in run_dir.glob("skips-rank*.jsonl"):
            trim(path, last_step)
    accelerator.wait_for_everyone()
    return SkipLedger(run_dir / ("skips.jsonl" if rank == 0 else f"skips-rank{rank}.jsonl"), budget, last_step)


def write_manifest(
    run_dir: Path, model: MmctxModel, plan: Plan, accelerator: Accelerator, attention: Resolution
) -> dict[str, Any]:
    """What the run is made of and with, in `manifest.json`; also returned."""
    manifest = {
        "parameters": count_parameters(model),
        "samples": plan.num_samples,
        "window": {"steps": plan.window_steps, "samples": plan.samples_per_window},
        "samples_per_step": plan.samples_per_step,
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "attention": attention.to_json(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mmctx", "torch", "accelerate", "transformers", "timm")},
    }
    (run_dir / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return manifest


def say_where_it_stands(
    config: RunConfig, run_dir: Path, state: TrainerState, resumed: bool, say: Callable[[str], None]
) -> None:
    """Tells where a run goes on, and whether it became longer since; `state` then knows."""
    if resumed and state.step >= config.steps:
        longer = "add a stage to `schedule`" if config.schedule else f"raise train.steps={config.steps}"
        say(f"{run_dir} is at step {state.step} already: {longer} to train on")
    elif resumed:
        say(f"resuming {run_dir} at step {state.step} of {config.steps}")
        if state.planned_steps != config.steps:
            name = "the schedule's length" if config.schedule else "train.steps"
            say(f"{name} is {config.steps}, was {state.planned_steps}: the learning rate follows the new length")
            state.planned_steps = config.steps


def explain_left_out(plan: Plan, data: RunData) -> Iterator[str]:
    """Warnings: sources that lose more than `data.skip_budget` of their samples before any is decoded; a quarantine of other shards."""
    unmatched = data.quarantine.unmatched(
        shard.content_hash for source, _ in data.dataset.sources for shard in source.shards
    )
    if unmatched:
        yield (
            f"WARNING: data.quarantine={data.config.quarantine}: {len(unmatched)} of {len(data.quarantine.entries)} entries are of shards "
            f"that this run does not read or that have changed, first {unmatched[0].shard}; check the shards again"
        )
    budget = plan.config.skip_budget
    for name, survey in zip(plan.names, plan.surveys, strict=True):
        reasons = Counter(survey.reasons)
        del reasons["other_length"]
        if reasons.total() > budget * survey.num_seen:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            seen = "" if survey.is_complete else f" looked at, of {survey.num_samples:,}"
            yield (
                f"WARNING: data.sources.{name}: {reasons.total()} of {survey.num_seen} samples{seen} are left out ({counts}), "
                f"more than data.skip_budget={budget}; training goes on without them, skips.jsonl names each as its turn comes"
            )


def announce_indexing(enabled: bool) -> Callable[[int, int], None]:
    """A progress function for `build_data` that speaks up every few seconds: fresh indexes pass in silence."""
    spoken = time.monotonic()

    def announce(done: int, total: int) -> None:
        nonlocal spoken
        if enabled and time.monotonic() - spoken > 3:
            spoken = time.monotonic()
            print(f"indexed {done} of {total} shards", file=sys.stderr, flush=True)

    return announce


class ProgressBar:
    """A rich progress bar on a terminal, plain lines elsewhere; always on stderr, so that stdout stays machine-readable."""

    def __init__(self, total: int, done: int, enabled: bool = True) -> None:
        self._bar, self._total, self._enabled = None, total, enabled
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("train", total=total, completed=done, note="")

    def advance(self, step: int) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, line: dict[str, Any]) -> None:
        """Shows the newest metrics."""
        losses = " ".join(
            f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/") and v is not None
        )
        note = f"loss {line['loss']:.3f} ({losses}) lr {line['lr']:.2e} {line['tokens_per_s']:,.0f} tok/s wait {line['data_wait']:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, note=note)
        elif self._enabled:
            print(f"step {line['step']}/{self._total} {note}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A message above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)  # paths may hold brackets
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
