"""One process's stretch of a run: its steps, lines and checkpoints. Read it from `Sitting.run` downwards."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmctx.attention.resolve import Resolution
from mmctx.config import dump_config
from mmctx.datasets.assemble import RunData
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.order import derive_key
from mmctx.datasets.planning.plan import Plan, share_out
from mmctx.datasets.shards.quarantine import write_quarantine
from mmctx.errors import CheckpointError
from mmctx.eval.results import drop_later
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch
from mmctx.parallel.mesh import Mesh
from mmctx.ranges import timed
from mmctx.train.audit import audit_before_training
from mmctx.train.checkpoints.saver import Saver
from mmctx.train.checkpoints.sharded import Shards
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.config import RunConfig
from mmctx.train.distribution import clip_gradients, is_sharded
from mmctx.train.evaluation import LoopEvaluation
from mmctx.train.init import Origin
from mmctx.train.interval import Interval
from mmctx.train.optim.modules import freeze
from mmctx.train.optim.update import Update
from mmctx.train.records import (
    Metrics,
    ProgressBar,
    explain_left_out,
    open_ledger,
    say_where_it_stands,
    write_manifest,
)
from mmctx.train.result import TrainResult
from mmctx.train.segments import continue_segments, kept_quarantine, read_segments, write_segments
from mmctx.train.stages import Stage, stage_of
from mmctx.train.step import GradientStep, MicroBatch
from mmctx.train.stop import StopOnSignal
from mmctx.train.sums import Sums
from mmctx.train.tuning import modules_of
from mmctx.train.utilisation import Utilisation
from mmctx.train.wrap import wrap_again


class Sitting:
    """One process's stretch of a run: from where the checkpoint left off to the end or a signal."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        mesh: Mesh,
        attention: Resolution,
        run_dir: Path,
        course: dict[int, RunData],
        model: MmctxModel,
        wrapped: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainerState | None,
        average: dict[str, Tensor] | None,
    ) -> None:
        self.config, self.accelerator, self.mesh, self.run_dir, self.course = config, accelerator, mesh, run_dir, course
        self.attention = attention
        self.state = state or TrainerState(planned_steps=config.steps)
        self.stages, self.steps = config.stages, config.steps
        self.raw_model, self.model, self.optimizer = model, wrapped, optimizer
        self.saved, self.failed = self.state.step, False
        self.reading: Generator[PackedBatch] | None = None
        self.bar = ProgressBar(self.steps, self.state.step, enabled=accelerator.is_main_process)
        last_step = state.step if state else -1
        self.ledger = open_ledger(run_dir, config.data.skip_budget, last_step, accelerator)
        self.metrics = Metrics(run_dir, last_step, config) if accelerator.is_main_process else None
        self.sums = Sums(accelerator, mesh)
        shards = Shards() if is_sharded(model) else None
        idle = shards is None and not accelerator.is_main_process
        self.saver = Saver(run_dir, config, shards, idle, self.bar.say)
        self.line: dict[str, Any] = {}
        self.weights = {name: objective.weight for name, objective in config.objectives.items()}
        self.gradient_step = GradientStep(accelerator, self.model, model, self.weights)
        self.update = Update(config, model, optimizer, self.state.guard, average, self._note_step)
        self.utilisation = Utilisation(config.train, accelerator)
        self.evaluation = LoopEvaluation(config, run_dir, accelerator, self.sums)
        self._enter(stage_of(self.stages, self.state.step))
        if accelerator.is_main_process:
            drop_later(run_dir, last_step)
            self._introduce(resumed=state is not None)

    def _enter(self, stage: Stage) -> None:
        """Takes up a stage: its data, its positions and windows, its plan from where the one before it stopped."""
        self.stage, self.data = stage, self.course.pop(stage.number)
        self.raw_model.trunk.set_context(stage.config.model.transformer)
        if freeze(self.raw_model, modules_of(self.raw_model, stage)):
            self.model = self.gradient_step.model = wrap_again(self.model, self.accelerator)
        if self.state.step == stage.start:
            self.update.begin_stage()
        self.plan = self._plan()
        self.work = next(iter(self.data.tables.values())).work
        if self.accelerator.is_main_process:
            write_segments(self.run_dir, self.state.segments)
        if self.config.schedule and self.state.step == stage.start and self.metrics is not None:
            self.metrics.write({"step": stage.start + 1, "stage": stage.number, "begins": stage.differences})
            self.bar.say(f"stage {stage.number + 1} of {len(self.stages)}, steps {stage.start + 1} to {stage.stop}")

    def _plan(self) -> Plan:
        """The plan of the run's current segment, which is a new one if the data changed since the last step."""
        state, config, where = self.state, self.stage.config, f"{self.run_dir}, step {self.state.step}"
        earlier = read_segments(state.segments, where) if state.step else []
        segments = continue_segments(earlier, state.step, config, self.data, where, self.bar.say)
        state.segments = [segment.to_json() for segment in segments]
        if config.data.quarantine and self.accelerator.is_main_process:
            write_quarantine(kept_quarantine(config, segments[-1].quarantine), self.data.quarantine.entries)
        return Plan(config.data, self.data.tables, config.train.seed, segments[-1].start)

    def run(self) -> TrainResult:
        """Every step from the current one on."""
        config, state, wish = self.config, self.state, None
        with StopOnSignal() as stop:  # before the loader's workers start
            self._audit()
            batches = self._batches()
            interval = Interval()
            self.model.train()
            while state.step < self.steps:
                if (wish := self._wish(stop)) is not None or self.failed:
                    break
                if state.step == self.stage.stop:
                    self._stop_reading()
                    self._enter(stage_of(self.stages, state.step))
                    self._audit()
                    batches = self._batches()
                self._step(batches, interval)
                state.step += 1
                self.bar.advance(state.step)
                if self._is_due(state.step):
                    self._log(interval)
                    self._evaluate()  # before the checkpoint: a run that is killed meanwhile comes back to it
                    interval = Interval()
                if state.step % config.train.save_every == 0 or state.step == self.stage.stop:
                    self._save()
            if interval.steps:  # stopped by a signal
                self._log(interval)
            if state.step > self.saved and not self.failed:
                self._save()
            self._finish_saving()
        return TrainResult(self.run_dir, state.step, wish, state.train_seconds, self.accelerator.is_main_process)

    def take(self, count: int) -> None:
        """Takes so many steps and does nothing else: no lines, no checkpoints. For measurements, on a run that is thrown away."""
        batches = self.reading or self._batches()
        self.model.train()
        for _ in range(count):
            with timed("step"):
                self._step(batches, Interval())
            self.state.step += 1

    def _audit(self) -> None:
        """Looks for leaks before the first step of this sitting and of each stage, if that is wished; leaves no trace in the run."""
        if self.config.train.audit and self.state.step < self.steps:
            device, config = self.accelerator.device, self.stage.config
            report = audit_before_training(config, self.raw_model, self.data, self.plan, self.state.step, device)
            self.bar.say(f"audit: {report.num_checks:,} checks on {report.documents} documents, no leaks")

    def _is_due(self, step: int) -> bool:
        """Whether a line is written after `step` steps: lines and checkpoints agree on where the run stands."""
        train = self.config.train
        if step % train.log_every == 0 or step % train.save_every == 0 or step == self.stage.stop:
            return True
        return self.evaluation.is_due(step)

    def _batches(self) -> Iterator[PackedBatch]:
        """This rank's batches from the current step to the end of the stage, until `_stop_reading`."""
        sampler = StepSampler(self.plan, self.state.step, self.stage.stop, self.mesh.data_rank, self.mesh.data_size)
        self.reading = _each(make_loader(self.data.dataset, sampler, self.stage.config.data))
        return self.reading

    def _stop_reading(self) -> None:
        """Ends the loader's processes, whatever they are at: none may outlive the loop, and keep what waits for this process waiting."""
        if self.reading is not None:
            self.reading.close()
            self.reading = None

    def _step(self, batches: Iterator[PackedBatch], interval: Interval) -> None:
        """One optimizer step over this rank's bins of the global batch."""
        mesh, step, train = self.mesh, self.state.step, self.config.train
        waited = time.perf_counter()
        with timed("data"):
            mine = share_out(self.plan.step(step), mesh.data_rank, mesh.data_size)
            whole = [next(batches) for _ in mine]
        interval.data_wait += time.perf_counter() - waited
        parts = [mesh.shard(batch) for batch in whole]
        seeds = [derive_key(train.seed, "dropout", step, bin_number) >> 1 for bin_number, _ in mine]
        muster = self.sums.muster(self.raw_model, [number for number, _ in mine], whole, parts)
        totals = self.gradient_step([MicroBatch(*one) for one in zip(seeds, parts, strict=True)], muster)
        self.update.regularise()
        with timed("clip"):
            norm = clip_gradients(self.model, self.accelerator, train.optimizer.clip_norm)
        bins = [(number, batch) for (number, _), batch in zip(mine, whole, strict=True)]
        loss = self.sums.loss(totals, muster.counts, self.weights)
        self.update(self.stage, step, loss, norm, lambda: self.sums.fingerprint(bins))
        interval.add(bins, muster, totals, norm, sum(self.work.batch(batch) for batch in whole))
        self._note_skips(whole, interval)

    def _note_step(self, line: dict[str, Any]) -> None:
        """The ledger's line of a step that was not taken."""
        if self.accelerator.is_main_process:
            self.ledger.write_event(line)
            self.bar.say(f"WARNING: step {line['step']} was left out: {line['reason']}, see skips.jsonl")

    def _note_skips(self, micro_batches: list[PackedBatch], interval: Interval) -> None:
        if self.mesh.sequence_rank == 0:
            self.ledger.record(micro_batches, self.state.step + 1)
        if any(batch.skips for batch in micro_batches) and self.accelerator.num_processes == 1:
            # Several ranks know their sums only when they log.
            skipped = self.state.skipped + interval.skips.total()
            self.ledger.check(skipped, self.state.samples + interval.samples + skipped)

    def _log(self, interval: Interval) -> None:
        """Writes one line: the only place where the loop waits for the device."""
        state = self.state
        self.update.settle()
        bin_tokens = self.stage.config.data.bin_tokens
        line = interval.finish(self.sums, state, self.weights, bin_tokens, self.utilisation) | {
            "lr": self.update.lr,
            "stage": self.stage.number,
            "segment": len(state.segments) - 1,
        }
        self.line = line
        if self.metrics is not None:
            self.metrics.write(line)
            self.bar.log(line)
        self.ledger.check(state.skipped, state.samples + state.skipped)

    def _evaluate(self) -> None:
        """On held-out data, where `eval.every` asks for it."""
        if not self.evaluation.is_due(self.state.step):
            return
        line = self.evaluation(self.stage, self.raw_model, self._average(), self.state)
        if self.metrics is not None:
            self.metrics.write(line)
            shown = ", ".join(f"{n.removeprefix('eval/')} {v:.4g}" for n, v in line.items() if n != "step")
            self.bar.say(f"step {self.state.step} held out: {shown}")

    def _average(self) -> dict[str, Tensor]:
        return self.update.ema.average if self.update.ema else {}

    def _save(self) -> None:
        self.saved = self.state.step
        self.update.settle()
        self.saver.save(self.raw_model, self.data.tokenizer, self.optimizer, self.state, self.line, self._average())

    def _finish_saving(self) -> None:
        """Until everything is on the disk. What one rank could not write is an error on all of them."""
        own = None
        try:
            self.saver.finish()
        except CheckpointError as error:
            own = str(error)
        if errors := [error for error in self.sums.gather(own) if error is not None]:
            raise CheckpointError(errors[0])

    def _wish(self, stop: StopOnSignal) -> signal.Signals | None:
        """The signal that some rank was stopped by; and `failed`, whether some rank could not save. All must agree."""
        heard = self.sums.gather((stop.wished, self.saver.failed))
        self.failed = any(failed for _, failed in heard)
        return next((wish for wish, _ in heard if wish is not None), None)

    def _introduce(self, resumed: bool) -> None:
        say_where_it_stands(self.config, self.run_dir, self.state, resumed, self.bar.say)
        dump_config(self.config, self.run_dir / "config.yaml")
        manifest = write_manifest(self.run_dir, self.raw_model, self.plan, self.accelerator, self.attention)
        self.bar.say(
            f"{self.run_dir}: {manifest['parameters']:,} parameters, {self.plan.num_samples:,} samples, "
            f"{self.plan.samples_per_step:.3g} of them a step"
        )
        if isinstance(self.raw_model.origin, Origin):
            self.bar.say(self.raw_model.origin.describe())
        self.bar.say(self.attention.describe(self.config.train.deterministic))
        for warning in explain_left_out(self.plan, self.data):
            self.bar.say(warning)

    def close(self) -> None:
        """Ends the loader's processes, closes files and the bar."""
        self._stop_reading()
        self.bar.close()
        self.ledger.close()
        if self.metrics is not None:
            self.metrics.close()


def _each(batches: Iterable[PackedBatch]) -> Generator[PackedBatch]:
    """The same, to be closed at any time."""
    yield from batches
