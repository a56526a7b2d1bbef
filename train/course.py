"""The data and plans of a run's stages: built when it starts, and followed from one stage to the next before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmctx.datasets.assemble import Progress, RunData, build_data
from mmctx.datasets.fetch import StepSampler
from mmctx.datasets.planning.forecast import forecast, largest_bin
from mmctx.datasets.planning.plan import Plan
from mmctx.errors import ConfigError, DataError
from mmctx.train.config import RunConfig
from mmctx.train.memory import estimate_memory
from mmctx.train.optim.learning_rate import learning_rate
from mmctx.train.segments import Segment, continue_segments
from mmctx.train.stages import Stage, stage_of


def build_stage(stage: Stage, progress: Progress | None = None) -> RunData:
    """The data of a stage."""
    run = stage.config
    return build_data(run.data, run.data.sources, run.model, run.objectives, run.train.seed, progress)


def build_course(config: RunConfig, step: int, world_size: int, progress: Progress | None = None) -> dict[int, RunData]:
    """Data of the stage that step `step` (from 0) belongs to and of all later ones, by their numbers.

    What would stop the run at the third stage stops it here: a source that has no sample of the stage's context, or batches that the
    processes cannot share.

    Raises:
        ConfigError, DataError: naming the stage.
    """
    stages = config.stages
    found: dict[int, RunData] = {}
    for stage in stages[stage_of(stages, step).number :]:
        found[stage.number] = data = build_stage(stage, progress)
        try:
            StepSampler(Plan(stage.config.data, data.tables, config.train.seed), 0, 0, 0, world_size)
        except (ConfigError, DataError) as error:
            if not config.schedule:
                raise
            raise type(error)(f"schedule.{stage.number}: {error}") from None
    return found


def plan_at(config: RunConfig, step: int, where: str) -> tuple[RunData, Plan]:
    """Data and plan that step `step` (from 0) of an undisturbed run belongs to; those of the last stage for steps after the end."""
    stages = config.stages
    for stage, data, plan in follow(config, where):
        if step < stage.stop or stage.number == len(stages) - 1:
            return data, plan
    raise AssertionError("a run has at least one stage")


def forecast_run(config: RunConfig, where: str) -> dict[str, Any]:
    """What a run will read, compute and need, stage by stage: what `mmctx plan` prints.

    Returns:
        `steps`, `tokens` and `flops` of the whole run, and `stages`: of each its settings, `forecast` and `memory`.
    """
    stages = []
    for stage, data, plan in follow(config, where):
        steps = stage.stop - stage.start
        step, number = largest_bin(plan, steps)
        memory = estimate_memory(stage.config, data.dataset[plan.step(step)[number]], len(data.tokenizer))
        span: dict[str, Any] = {"first_step": stage.start + 1, "last_step": stage.stop}
        span["learning_rate"] = {
            "first": rate_at(config, stage, stage.start),
            "middle": rate_at(config, stage, (stage.start + stage.stop) // 2),
            "last": rate_at(config, stage, stage.stop - 1),
        }
        stages.append(span | stage.differences | forecast(plan, steps) | {"memory": memory})
    totals = {name: sum(stage[name] for stage in stages) for name in ("steps", "tokens", "flops")}
    return totals | {"peak_memory": max(stage["memory"]["total"] for stage in stages), "stages": stages}


def rate_at(config: RunConfig, stage: Stage, step: int) -> float:
    """Learning rate of step `step` (from 0) of a run, which belongs to `stage`."""
    schedule = config.train.schedule.in_steps(config.stages)
    return learning_rate(step, config.steps, config.train.optimizer.lr, schedule) * stage.lr_factor


def follow(config: RunConfig, where: str) -> Iterator[tuple[Stage, RunData, Plan]]:
    """Each stage of a run that nothing interferes with, its data, and its plan from where the stage before it stops.

    Args:
        config: of the run.
        where: names it in errors.
    """
    segments: list[Segment] = []
    for stage in config.stages:
        data = build_stage(stage)
        segments = continue_segments(segments, stage.start, stage.config, data, where, lambda text: None)
        yield stage, data, Plan(stage.config.data, data.tables, config.train.seed, segments[-1].start)
