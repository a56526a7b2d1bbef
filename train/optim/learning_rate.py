"""The learning rate as a pure function of the step: nothing to save, nothing that a restart could change."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmctx.train.stages import Stage


class ScheduleConfig(StrictModel):
    """Shape of the learning rate over a run."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; wsd (warm-up, stable, decay; Hu et al. 2024, MiniCPM) stays at the peak until its decay begins."""
    warmup_steps: int = Field(default=100, ge=0)
    """Linear rise from zero."""
    warmup_tokens: int | None = Field(default=None, ge=1)
    """In place of `warmup_steps`: as many steps as full batches need for so many tokens."""
    final_ratio: float = Field(default=0.05, ge=0, le=1)
    """Share of the peak that is left at the end."""
    decay_steps: int | None = Field(default=None, ge=1)
    """wsd alone: the last steps, in which the rate falls. The run can be branched off or lengthened before them."""
    decay_tokens: int | None = Field(default=None, ge=1)
    """wsd alone, in place of `decay_steps`: as many of the last steps as full batches need for so many tokens."""
    decay: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """wsd alone: how it falls; sqrt is 1 - sqrt(progress) (Hägele et al. 2024)."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        lengths = [value for value in (self.decay_steps, self.decay_tokens) if value is not None]
        if len(lengths) != (self.kind == "wsd"):
            asked = f"decay_steps={self.decay_steps} and decay_tokens={self.decay_tokens}"
            rule = "wsd takes one of them" if self.kind == "wsd" else f"{self.kind} takes neither, wsd does"
            raise ValueError(f"found {asked}: {rule}")
        return self

    def in_steps(self, stages: Sequence[Stage]) -> ScheduleConfig:
        """The same with lengths in steps alone, counted in the full batches of the run's own stages."""
        update: dict[str, int | None] = {}
        if self.warmup_tokens is not None:
            update |= {"warmup_steps": steps_for(self.warmup_tokens, stages), "warmup_tokens": None}
        if self.decay_tokens is not None:
            update |= {"decay_steps": steps_for(self.decay_tokens, stages, from_end=True), "decay_tokens": None}
        return self.model_copy(update=update)


def steps_for(tokens: int, stages: Sequence[Stage], from_end: bool = False) -> int:
    """Steps that full batches need for so many tokens, over the stages from the first on (or from the last backwards).

    Beyond the run's end the last batch's size goes on.
    """
    steps, left, batch = 0, tokens, 1
    for stage in reversed(stages) if from_end else stages:
        batch = stage.config.data.bin_tokens * stage.config.data.bins_per_step
        needed = min(ceil(Fraction(left, batch)), stage.stop - stage.start)
        steps, left = steps + needed, left - needed * batch
        if left <= 0:
            return steps
    return steps + ceil(Fraction(left, batch))


FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""How a rate falls from 1 to 0 as progress goes from 0 to 1."""


def learning_rate(step: int, steps: int, peak: float, config: ScheduleConfig) -> float:
    """Learning rate of `step` (from 0) out of `steps`: linear warm-up, then the configured shape down to `final_ratio`.

    Args:
        step: counted from 0.
        steps: of the whole run.
        peak: the highest rate.
        config: with lengths in steps, see `ScheduleConfig.in_steps`.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    start, fall = config.warmup_steps, config.kind
    if config.kind == "wsd":
        start, fall = max(start, steps - (config.decay_steps or 0)), config.decay
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    return peak * (config.final_ratio + (1 - config.final_ratio) * FALLS[fall](progress))
