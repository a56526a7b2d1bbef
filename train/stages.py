"""Stages of a run: a context that grows, with its positions, windows, batches and data mix, in one resumable run.

    schedule:
      - {steps: 2000, context_length: 2048}
      - {steps: 200, context_length: 8192, bin_tokens: 8192, rope: {scaling: yarn, factor: 4, original_context: 2048}, lr_factor: 0.5}

A stage says what it changes of `data` and `model.transformer`; a run without a schedule is one stage of `train.steps` steps. Lengthening a
finished run is one more stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from mmctx.config import StrictModel, build_config
from mmctx.errors import ConfigError
from mmctx.train.optim.modules import Modules, merged

if TYPE_CHECKING:
    from mmctx.train.config import RunConfig


class StageConfig(StrictModel):
    """One stage: how long it is, and what it changes. What it leaves out is as in `data` and `model`."""

    steps: int | None = Field(default=None, ge=1)
    """Global steps of the stage; or give `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """As many steps as full batches (`bin_tokens` times `bins_per_step`) need for so many tokens."""
    context_length: int | None = Field(default=None, ge=1)
    """Longest document, as `data.context_length`."""
    bin_tokens: int | None = Field(default=None, ge=1)
    """As `data.bin_tokens`."""
    bins_per_step: int | None = Field(default=None, ge=1)
    """As `data.bins_per_step`: with `bin_tokens`, the tokens of a global batch."""
    sources: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """The data mix: weights of those of `data.sources` that are read; others are not. Sources of the same shards with other `lengths` are
    buckets of length."""
    rope: dict[str, Any] | None = None
    """What changes in `model.transformer.rope`."""
    windows: tuple[Annotated[int, Field(ge=1)] | None, ...] | None = Field(default=None, min_length=1)
    """As `model.transformer.windows`."""
    lr_factor: float = Field(default=1.0, gt=0)
    """Factor of the learning rate that `train.optimizer` and `train.schedule` give."""
    modules: Modules = Field(default_factory=dict)
    """What changes in `train.modules`, such as `{trunk: {freeze: true}}`."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"a stage takes either steps or tokens, found steps={self.steps} and tokens={self.tokens}")
        return self


@dataclass(frozen=True)
class Stage:
    """A stretch of a run under one configuration.

    Attributes:
        number: counted from 0.
        start: its first step, counted from 0.
        stop: the first step after it.
        config: the run as if it were this stage alone: `data` and `model` as they are now.
        lr_factor: of the learning rate.
    """

    number: int
    start: int
    stop: int
    config: RunConfig
    lr_factor: float = 1.0

    @property
    def differences(self) -> dict[str, Any]:
        """What sets the stage apart, for `metrics.jsonl` and `mmctx plan`."""
        data, trunk = self.config.data, self.config.model.transformer
        return {
            "context_length": data.context_length,
            "bin_tokens": data.bin_tokens,
            "bins_per_step": data.bins_per_step,
            "sources": {name: source.weight for name, source in data.sources.items()},
            "rope": trunk.rope.model_dump(exclude_defaults=True),
            "windows": [trunk.layer_window(layer) for layer in range(trunk.depth)],
            "lr_factor": self.lr_factor,
            "modules": {p: m.model_dump(exclude_none=True) for p, m in self.config.train.modules.items()},
        }


def resolve_stages(run: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run, each with the configuration that holds in it.

    Raises:
        ConfigError: a stage names a source that `data` lacks, or its sizes do not fit together.
    """
    if not run.schedule:
        return (Stage(0, 0, run.train.steps or DEFAULT_STEPS, run),)
    stages: list[Stage] = []
    for number, stage in enumerate(run.schedule):
        config = _at(run, stage, f"schedule.{number}")
        start = stages[-1].stop if stages else 0
        stages.append(Stage(number, start, start + _steps(stage, config), config, stage.lr_factor))
    return tuple(stages)


DEFAULT_STEPS = 1000


def _steps(stage: StageConfig, config: RunConfig) -> int:
    if stage.steps is not None:
        return stage.steps
    return ceil((stage.tokens or 0) / (config.data.bin_tokens * config.data.bins_per_step))


def _at(run: RunConfig, stage: StageConfig, where: str) -> RunConfig:
    tree = run.model_dump(mode="json", exclude={"schedule"})
    for name in ("context_length", "bin_tokens", "bins_per_step"):
        tree["data"][name] = getattr(stage, name) or tree["data"][name]
    trunk = tree["model"]["transformer"]
    trunk["rope"] |= stage.rope or {}
    trunk["windows"] = stage.windows or trunk["windows"]
    modules = merged(run.train.modules, stage.modules)
    tree["train"]["modules"] = {path: settings.model_dump() for path, settings in modules.items()}
    if stage.sources is not None:
        if unknown := sorted(stage.sources.keys() - run.data.sources.keys()):
            raise ConfigError(f"{where}.sources names {unknown[0]!r}, but data.sources has {sorted(run.data.sources)}")
        known = tree["data"]["sources"]
        tree["data"]["sources"] = {name: known[name] | {"weight": weight} for name, weight in stage.sources.items()}
    tree["train"]["steps"] = None
    return build_config(type(run), tree, where)


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that global step `step` (counted from 0) belongs to; the last one for steps after the end."""
    return next((stage for stage in stages if step < stage.stop), stages[-1])


def trained_stage(run: RunConfig, step: int) -> Stage:
    """The stage that a checkpoint after `step` steps was last trained in: what it is evaluated with."""
    return stage_of(run.stages, max(step - 1, 0))


def find_changed_past(before: RunConfig, now: RunConfig, step: int) -> list[str]:
    """What a schedule changes of the `step` steps that a run has made, one line for each stage; what is to come may change freely."""
    lines = []
    for old in before.stages:
        if old.start >= step:
            break
        new = stage_of(now.stages, old.start)
        # a run that is asked to be shorter than it is already has nothing left to do: no harm in that
        done = min(old.stop, step)
        asked = done if new.number == len(now.stages) - 1 and new.stop <= step else min(new.stop, step)
        if (new.start, asked) != (old.start, done):
            lines.append(f"  schedule.{old.number}: steps {old.start}..{done} are done, asked for {new.start}..{asked}")
            continue
        theirs, ours = old.differences, new.differences
        lines += [
            f"  schedule.{old.number}.{key}: {theirs[key]!r} in the checkpoint, {ours[key]!r} asked for"
            for key in ("rope", "windows", "lr_factor", "modules")  # what the data was, its segments record
            if theirs[key] != ours[key] and min(old.stop, step) > old.start
        ]
    return lines
