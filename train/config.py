"""The root of the configuration tree: everything a run is."""

from __future__ import annotations

import re
from typing import Any, Literal

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
from mmctx.train.init import inherit
from mmctx.train.optim.config import AdamWConfig, AnyOptimizer
from mmctx.train.optim.ema import EmaConfig
from mmctx.train.optim.guard import GuardConfig
from mmctx.train.optim.learning_rate import ScheduleConfig
from mmctx.train.optim.modules import ModuleConfig
from mmctx.train.stages import Stage, StageConfig, resolve_stages
from mmctx.train.together import check_distribution, check_sources, check_streams
from mmctx.train.trackers import TrackerName
from mmctx.train.tuning import check_tuning
from mmctx.tuning import AnyTuning, FullTuning


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
    init: str | None = None
    """A checkpoint, or a run's folder, whose weights a fresh run starts from. `model` and `data.tokenizer` are then its own where this file
    does not say otherwise; what the checkpoint lacks is drawn from the seed. Not read again when the run goes on."""
    tune: AnyTuning = FullTuning()
    """`kind: full`, or what little is trained over frozen weights: `lora`, `adalora`, `prefix` or `adapter`."""
    modules: dict[str, ModuleConfig] = Field(default_factory=dict)
    """Learning rate, weight decay and freezing of single modules, by their paths, such as `encoders.image`; stages may change them. With
    `tune`, `freeze: false` trains a module, too."""
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

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, tree: Any) -> Any:
        """Shape and tokenizer from `train.init`."""
        train = tree.get("train") if isinstance(tree, dict) else None
        return inherit(tree) if isinstance(train, dict) and isinstance(train.get("init"), str) else tree

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for name in self.objectives:
            if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict, name):
                raise ValueError(f"objectives: {name!r} cannot name an objective; use letters, digits and underscores")
        check_tuning(self)
        check_distribution(self)
        check_sources(self)
        check_streams(self)
        positions, context = self.model.transformer.learned_positions, self.data.context_length
        if positions is not None and context > positions:
            raise ValueError(
                f"data.context_length={context} is longer than model.transformer.learned_positions={positions}; lower it, or ask for more "
                "positions (which a pretrained folder's are stretched to by model.transformer.resize_positions)"
            )
        if unknown := self.run.card.data_licenses.keys() - self.data.sources.keys():
            raise ValueError(
                f"run.card.data_licenses names {min(unknown)!r}, but data.sources has {', '.join(sorted(self.data.sources))}"
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
