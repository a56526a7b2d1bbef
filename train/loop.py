"""The training loop: read it from `train` downwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mmctx.attention.resolve import Resolution
from mmctx.config import dump_config
from mmctx.datasets.assemble import RunData
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.order import derive_key
from mmctx.datasets.planning.plan import Plan, share_out
from mmctx.datasets.shards.quarantine import write_quarantine
from mmctx.determinism import deterministic_algorithms
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch
from mmctx.parallel.mesh import Mesh, build_mesh
from mmctx.train.attention import settled_attention
from mmctx.train.audit import audit_before_training
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import load_optimizer, load_run_config, load_weights, without_pretrained
from mmctx.train.checkpoints.resume import checkpoint_to_resume
from mmctx.train.checkpoints.same_run import check_same_run
from mmctx.train.checkpoints.saver import Saver
from mmctx.train.checkpoints.state import TrainerState, read_state
from mmctx.train.config import RunConfig
from mmctx.train.course import build_course
from mmctx.train.interval import Interval
from mmctx.train.optim import build_optimizer, learning_rate
from mmctx.train.preflight import check_run
from mmctx.train.records import (
    Metrics,
    ProgressBar,
    announce_indexing,
    explain_left_out,
    open_ledger,
    write_manifest,
)
from mmctx.train.segments import continue_segments, kept_quarantine, read_segments, write_segments
from mmctx.train.stages import Stage, stage_of
from mmctx.train.step import GradientStep, MicroBatch
from mmctx.train.stop import StopOnSignal
from mmctx.train.sums import Sums


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        run_dir: the run's folder.
        step: steps done in all.
        interrupted: stopped by a signal before the last step.
        train_seconds: time spent in the loop, earlier sittings included.
        is_main_process: False on all ranks but one.
    """

    run_dir: Path
    step: int
    interrupted: bool
    train_seconds: float
    is_main_process: bool


def train(config: RunConfig) -> TrainResult:
    """Trains a run to its last step, from its newest checkpoint if it has one.

    Works alone and under `accelerate launch` or `torchrun`. Evaluation is not part of it: see `mmctx.eval`.

    Raises:
        MmctxError: whatever a user can mend, with the file or key, both values and the remedy.
    """
    check_run(config)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    with deterministic_algorithms(config.train.deterministic):  # before anything runs on a GPU
        return _train(config)


def _train(config: RunConfig) -> TrainResult:
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no", cpu=not torch.cuda.is_available()
    )
    try:
        with settled_attention(config, accelerator) as attention:
            sitting = _sit_down(config, accelerator, attention)
            try:
                return sitting.run()
            finally:
                sitting.close()
    finally:
        # A notebook may train again with another precision; accelerate keeps its state for the whole process.
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _sit_down(config: RunConfig, accelerator: Accelerator, attention: Resolution) -> Sitting:
    """Data, model and optimizer, as the newest checkpoint left them."""
    size = config.train.sequence_parallel
    mesh = build_mesh(accelerator.device.type, accelerator.process_index, accelerator.num_processes, size)
    run_dir = Path(config.run.dir) / config.run.name
    checkpoint = checkpoint_to_resume(run_dir, accelerator)
    state = read_state(checkpoint) if checkpoint else None
    with accelerator.main_process_first():  # the others find the indexes that the first one wrote
        progress = announce_indexing(enabled=accelerator.is_main_process)
        course = build_course(config, state.step if state else 0, mesh.data_size, progress)
    shape = config.model_copy(update={"model": without_pretrained(config.model)}) if checkpoint else config
    model = build_model(shape, len(next(iter(course.values())).tokenizer))
    if checkpoint and state:
        check_same_run(load_run_config(checkpoint), config, checkpoint, state.step)
        load_weights(model, checkpoint)
    optimizer = build_optimizer(model, config.train.optimizer)
    if checkpoint:
        load_optimizer(model, optimizer, checkpoint)
    return Sitting(config, accelerator, mesh, attention, run_dir, course, model, optimizer, state)


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
        optimizer: torch.optim.Optimizer,
        state: TrainerState | None,
    ) -> None:
        self.config, self.accelerator, self.mesh, self.run_dir, self.course = config, accelerator, mesh, run_dir, course
        self.attention = attention
        self.state = state or TrainerState(planned_steps=config.steps)
        self.stages, self.steps = config.stages, config.steps
        self.raw_model = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.saved = self.state.step
        self.bar = ProgressBar(self.steps, self.state.step, enabled=accelerator.is_main_process)
        last_step = state.step if state else -1
        self.ledger = open_ledger(run_dir, config.data.skip_budget, last_step, accelerator)
        self.metrics = Metrics(run_dir, last_step, config.train.tensorboard) if accelerator.is_main_process else None
        self.sums = Sums(accelerator, mesh)
        self.saver = Saver(run_dir, config, say=self.bar.say)
        self.line: dict[str, Any] = {}
        self.weights = {name: objective.weight for name, objective in config.objectives.items()}
        self.gradient_step = GradientStep(accelerator, self.model, model, self.weights)
        self._enter(stage_of(self.stages, self.state.step))
        if accelerator.is_main_process:
            self._introduce(resumed=state is not None)

    def _enter(self, stage: Stage) -> None:
        """Takes up a stage: its data, its positions and windows, its plan from where the one before it stopped."""
        self.stage, self.data = stage, self.course.pop(stage.number)
        self.raw_model.trunk.set_context(stage.config.model.transformer)
        self.plan = self._plan()
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
        config, state = self.config, self.state
        with StopOnSignal() as stop:  # before the loader's workers start
            self._audit()
            batches = self._batches()
            interval = Interval()
            self.model.train()
            while state.step < self.steps and not self._stopped(stop):
                self.saver.check()
                if state.step == self.stage.stop:
                    del batches  # with its workers
                    self._enter(stage_of(self.stages, state.step))
                    self._audit()
                    batches = self._batches()
                self._step(batches, interval)
                state.step += 1
                self.bar.advance(state.step)
                if self._is_due(state.step):
                    self._log(interval)
                    interval = Interval()
                if state.step % config.train.save_every == 0 or state.step == self.stage.stop:
                    self._save()
            if interval.steps:  # stopped by a signal
                self._log(interval)
            if state.step > self.saved:
                self._save()
            self.saver.finish()
        interrupted, main = state.step < self.steps, self.accelerator.is_main_process
        return TrainResult(self.run_dir, state.step, interrupted, state.train_seconds, main)

    def _audit(self) -> None:
        """Looks for leaks before the first step of this sitting and of each stage, if that is wished; leaves no trace in the run."""
        if self.config.train.audit and self.state.step < self.steps:
            device, config = self.accelerator.device, self.stage.config
            report = audit_before_training(config, self.raw_model, self.data, self.plan, self.state.step, device)
            self.bar.say(f"audit: {report.num_checks:,} checks on {report.documents} documents, no leaks")

    def _is_due(self, step: int) -> bool:
        """Whether a line is written after `step` steps: lines and checkpoints agree on where the run stands."""
        train = self.config.train
        return step % train.log_every == 0 or step % train.save_every == 0 or step == self.stage.stop

    def _batches(self) -> Iterator[PackedBatch]:
        sampler = StepSampler(self.plan, self.state.step, self.stage.stop, self.mesh.data_rank, self.mesh.data_size)
        return iter(make_loader(self.data.dataset, sampler, self.stage.config.data))

    def _step(self, batches: Iterator[PackedBatch], interval: Interval) -> None:
        """One optimizer step over this rank's bins of the global batch."""
        mesh, step, train = self.mesh, self.state.step, self.config.train
        waited = time.perf_counter()
        mine = share_out(self.plan.step(step), mesh.data_rank, mesh.data_size)
        whole = [next(batches) for _ in mine]
        interval.data_wait += time.perf_counter() - waited
        parts = [mesh.shard(batch) for batch in whole]
        seeds = [derive_key(train.seed, "dropout", step, bin_number) >> 1 for bin_number, _ in mine]
        muster = self.sums.muster(self.raw_model, whole, parts)
        totals = self.gradient_step([MicroBatch(*one) for one in zip(seeds, parts, strict=True)], muster)
        interval.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), train.optimizer.clip_norm)
        lr = learning_rate(step, self.steps, train.optimizer.lr, train.schedule) * self.stage.lr_factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        interval.add(whole, muster, totals)
        interval.newest = [(number, batch) for (number, _), batch in zip(mine, whole, strict=True)]
        self._note_skips(whole, interval)

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
        line = interval.finish(self.sums, state, self.weights, self.stage.config.data.bin_tokens) | {
            "lr": self.optimizer.param_groups[0]["lr"],
            "stage": self.stage.number,
            "segment": len(state.segments) - 1,
        }
        self.line = line
        if self.metrics is not None:
            self.metrics.write(line)
            self.bar.log(line)
        self.ledger.check(state.skipped, state.samples + state.skipped)

    def _save(self) -> None:
        self.saved = self.state.step
        if self.accelerator.is_main_process:
            self.saver.save(self.raw_model, self.data.tokenizer, self.optimizer, self.state, self.line)

    def _stopped(self, stop: StopOnSignal) -> bool:
        """Whether some rank was asked to stop: all must agree."""
        return any(self.sums.gather(stop.wished))

    def _introduce(self, resumed: bool) -> None:
        state, plan, steps = self.state, self.plan, self.steps
        if resumed and state.step >= steps:
            longer = "add a stage to `schedule`" if self.config.schedule else f"raise train.steps={steps}"
            self.bar.say(f"{self.run_dir} is at step {state.step} already: {longer} to train on")
        elif resumed:
            self.bar.say(f"resuming {self.run_dir} at step {state.step} of {steps}")
            if state.planned_steps != steps:
                name = "the schedule's length" if self.config.schedule else "train.steps"
                self.bar.say(f"{name} is {steps}, was {state.planned_steps}: the learning rate follows the new length")
                state.planned_steps = steps
        dump_config(self.config, self.run_dir / "config.yaml")
        manifest = write_manifest(self.run_dir, self.raw_model, plan, self.accelerator, self.attention)
        self.bar.say(
            f"{self.run_dir}: {manifest['parameters']:,} parameters, {plan.num_samples:,} samples, "
            f"{plan.samples_per_step:.3g} of them a step"
        )
        self.bar.say(self.attention.describe(self.config.train.deterministic))
        for warning in explain_left_out(plan, self.data):
            self.bar.say(warning)

    def close(self) -> None:
        """Closes files and the bar."""
        self.bar.close()
        self.ledger.close()
        if self.metrics is not None:
            self.metrics.close()
