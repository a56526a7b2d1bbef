"""What a sweep tries: the run it varies, the keys it varies, and how it judges a trial."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel


class NumberRange(StrictModel):
    """Numbers from `low` to `high`, both included; whole ones if both are whole."""

    low: int | float
    """The least."""
    high: int | float
    """The greatest."""
    log: bool = False
    """Evenly in the logarithm, as learning rates want."""
    step: int | float | None = Field(default=None, gt=0)
    """Only `low`, `low + step` and so on; null takes any."""

    @model_validator(mode="after")
    def _check(self) -> NumberRange:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be less than high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, found {self.low}")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together: leave out one")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))


class PrunerConfig(StrictModel):
    """When a trial is given up before its end."""

    kind: Literal["median", "hyperband", "none"] = "median"
    """median: worse than the median of earlier trials at the same step. hyperband: by successive halving (Li et al. 2018). none: never."""
    warmup_trials: int = Field(default=4, ge=0)
    """median: so many trials run to their end first."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of each trial in which it is not given up."""


Range = NumberRange | Annotated[tuple[Any, ...], Field(min_length=1)]


class SweepConfig(StrictModel):
    """One YAML file beside the run's."""

    name: str
    """Folder of the sweep below `dir`."""
    dir: str = "runs"
    """Folder of all runs."""
    config: str
    """YAML file of the run that is varied."""
    overrides: tuple[str, ...] = ()
    """What all trials change of it, such as `train.steps=100`."""
    metric: str = "loss"
    """What is judged: a name in metrics.jsonl, such as `loss` or `eval/retrieval/...`; at the end also one of eval.json's headlines."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which way is better."""
    trials: int = Field(default=20, ge=1)
    """How many in all, over all sittings and processes."""
    ranges: dict[str, Range] = Field(min_length=1)
    """Dotted keys of the run's config: `{low, high, log, step}`, or a list of choices."""
    pruner: PrunerConfig = PrunerConfig()
    """When trials are given up."""
    seed: int = 0
    """Of the choices."""
    launch: tuple[str, ...] = ()
    """What starts a trial's processes, such as `[accelerate, launch, --num_processes, "8"]`; by default one process of this Python."""
    keep_checkpoints: Literal["best", "all"] = "best"
    """best: checkpoints of trials that were not the best so far are deleted when they end; their metrics stay."""
