"""The root of the configuration tree: everything a run is."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from mmctx.activations import ActivationsConfig
from mmctx.config import StrictModel
from mmctx.datasets.config import DataConfig
from mmctx.eval.config import EvalConfig
from mmctx.model import ModelConfig
from mmctx.objectives import AnyObjective
from mmctx.train.checkpoints.retention import KeepConfig
from mmctx.train.distribution import DistributionConfig
from mmctx.train.optim.config import AdamWConfig, AnyOptimizer
from mmctx.train.optim.ema import EmaConfig
from mmctx.train.optim.guard import GuardConfig
from mmctx.train.optim.learning_rate import ScheduleConfig
from mmctx.train.optim.modules import ModuleConfig
from mmctx.train.stages import Stage, StageConfig, resolve_stages
from mmctx.train.trackers import TrackerName


class CardConfig(StrictModel):
    """What only people can say of a model; the rest of its card (`README.md` of a checkpoint) is written from the run."""

    summary: str | None = None
    """What it is, in a sentence or two."""
    license: str | None = None
    """Of the weights, as the Hugging Face hub names it, such as apache-2.0."""
    data_licenses: dict[str, str] = Field(default_factory=dict)
    """Licence of each source of data."""
    languages: tuple[str, ...] = ()
    """Codes of the languages it reads, such as en, zh."""
    intended_use: str | None = None
    """What it is for, and for whom."""
    limits: tuple[str, ...] = ()
    """What it is not for, and what is known to go wrong."""


class RunInfo(StrictModel):
    """Where the run lives, and what is said of its model."""

    name: str
    """Folder of the run below `dir`."""
    dir: str = "runs"
    """Folder of all runs."""
    card: CardConfig = CardConfig()
    """What the model card says besides numbers."""


class TrainConfig(StrictModel):
    """The loop."""

    steps: int | None = Field(default=None, ge=1)
    """Global steps, 1,000 if null. A run with a `schedule` has those of its stages."""
    seed: int = 0
    """Seeds weights, order, masking and dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs matrix products in bfloat16 under autocast; weights and optimizer stay fp32."""
    optimizer: AnyOptimizer = AdamWConfig()
    """`kind: adamw`, `adafactor` or `muon`."""
    modules: dict[str, ModuleConfig] = Field(default_factory=dict)
    """Learning rate, weight decay and freezing of single modules, by their paths, such as `encoders.image`; stages may change them."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""
    ema: EmaConfig | None = None
    """Keeps averaged weights, too, for `eval.weights: ema`; null does not."""
    guard: GuardConfig | None = GuardConfig()
    """Leaves out steps that would harm the weights; null takes each step as it comes."""
    activations: ActivationsConfig = ActivationsConfig()
    """What is kept for the backward pass and what is computed again: memory against time."""
    compile: bool = False
    """Compile the trunk's blocks (torch.compile): once, for all document lengths. Needs a C++ compiler on CPU."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl; the device is asked for numbers only then."""
    save_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep: KeepConfig = KeepConfig()
    """Which checkpoints stay."""
    audit: bool = False
    """Audit the model for leaks on the data of the next step, before training and before each stage, and stop if there is one; see
    `mmctx audit`."""
    trackers: tuple[TrackerName, ...] = ()
    """Who gets the lines of metrics.jsonl, too: `tensorboard` (in the run's folder), `wandb` (project `$WANDB_PROJECT` or mmctx)."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """TFLOP/s that one device could do at `precision`, for the model FLOPs utilisation; null looks it up by the device's name."""
    num_threads: int | None = None
    """CPU threads of torch; null leaves torch's choice."""
    distribution: DistributionConfig = DistributionConfig()
    """What each of several processes holds of the model."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Processes that share each bin, token by token; it must divide the transformer's `num_heads` and the number of processes."""
    deterministic: bool = False
    """The same bits from the same batch: only operations and attention backends whose backward pass is deterministic. Slower on a GPU."""


class RunConfig(StrictModel):
    """One YAML file."""

    run: RunInfo
    """Name and place."""
    data: DataConfig
    """What is read."""
    model: ModelConfig
    """What is trained."""
    objectives: dict[str, AnyObjective]
    """What it is trained for."""
    train: TrainConfig = TrainConfig()
    """How."""
    schedule: tuple[StageConfig, ...] = ()
    """Stages in which the context grows; without any, the run is one stage of `train.steps` steps."""
    eval: EvalConfig = EvalConfig()
    """What is measured at the end."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for name in self.objectives:
            if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict, name):
                raise ValueError(f"objectives: {name!r} cannot name an objective; use letters, digits and underscores")
        heads, ranks = self.model.transformer.num_heads, self.train.sequence_parallel
        if heads % ranks:
            fitting = [count for count in range(1, heads + 1) if heads % count == 0]
            raise ValueError(
                f"train.sequence_parallel={ranks} must divide model.transformer.num_heads={heads}, which are shared out over the ranks; "
                f"use one of {', '.join(map(str, fitting))}"
            )
        if ranks > 1 and self.model.transformer.picture_positions == "grid":
            raise ValueError(
                f"train.sequence_parallel={ranks} may cut a picture in two, and picture_positions: grid needs it whole; use sequence"
            )
        positions, context = self.model.transformer.learned_positions, self.data.context_length
        if positions is not None and context > positions:
            raise ValueError(
                f"data.context_length={context} is longer than model.transformer.learned_positions={positions}; lower it, or ask for more "
                "positions (which a pretrained folder's are stretched to by model.transformer.resize_positions)"
            )
        if self.train.audit and self.train.distribution.kind == "fsdp2":
            raise ValueError(
                "train.audit looks at whole models, and train.distribution.kind: fsdp2 splits them; run `mmctx audit CONFIG` instead"
            )
        if self.train.optimizer.kind == "adafactor" and self.train.distribution.kind == "fsdp2":
            raise ValueError(
                "train.optimizer.kind: adafactor (PyTorch's) cannot take means over the rows and columns of matrices that "
                "train.distribution.kind: fsdp2 splits; use adamw or muon, or distribution.kind: ddp"
            )
        pieces = {"activations.mlp_tile": self.train.activations.mlp_tile, "compile": self.train.compile}
        if ranks > 1 and self.model.transformer.dropout and (used := [name for name, value in pieces.items() if value]):
            raise ValueError(
                f"train.{used[0]} cannot be had with train.sequence_parallel={ranks} and dropout, whose masks are those of the whole "
                "sequence; set model.transformer.dropout=0"
            )
        if unknown := self.run.card.data_licenses.keys() - self.data.sources.keys():
            raise ValueError(
                f"run.card.data_licenses names {min(unknown)!r}, but data.sources has {', '.join(sorted(self.data.sources))}"
            )
        for where, sources in (("data", self.data.sources), ("eval", self.eval.sources)):
            for name, source in sources.items():
                for objective in source.objectives:
                    if objective not in self.objectives:
                        defined = sorted(self.objectives)
                        raise ValueError(
                            f"{where}.sources.{name}.objectives names {objective!r}, but `objectives` defines {defined}"
                        )
        if self.eval.weights == "ema" and self.train.ema is None:
            raise ValueError(
                "eval.weights=ema asks for averaged weights, but train.ema is null; set it, for example train.ema.decay=0.999"
            )
        if self.schedule and self.train.steps is not None:
            raise ValueError(
                f"train.steps={self.train.steps} and a schedule of {self.steps} steps: the stages say how long a run is, remove train.steps"
            )
        _ = self.stages  # each must hold together
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, each with the configuration that holds in it; made anew at each call."""
        return resolve_stages(self)

    @property
    def steps(self) -> int:
        """Global steps of the whole run."""
        return self.stages[-1].stop
