"""What is measured, and on what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.datasets.config import SourceConfig
from mmctx.eval.haystack.config import NeedleConfig, PasskeyConfig, WorldConfig
from mmctx.eval.suite_config import (
    AttributionConfig,
    CaptionEvalConfig,
    KnowledgeConfig,
    LossByPositionConfig,
    ProbeConfig,
    RobustnessConfig,
    StsConfig,
    ZeroShotConfig,
)


class EvalConfig(StrictModel):
    """Held-out evaluation."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Held-out sources, read in full, in order. None means no evaluation at the end of training."""
    suites: tuple[str, ...] = ("loss", "retrieval", "caption", "masked_lm")
    """Suites of `mmctx.eval.SUITES` that run at the end of training and by `mmctx eval`, in this order."""
    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations inside training; null evaluates at its end alone."""
    loop_suites: tuple[str, ...] = ("loss",)
    """Suites that run every `every` steps, shared out over all processes; their numbers are lines of metrics.jsonl."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Longest caption or transcript."""
    loss_by_position: LossByPositionConfig = LossByPositionConfig()
    """What the suite of this name reads."""
    weights: Literal["trained", "ema"] = "trained"
    """Which weights of a checkpoint: as trained last, or their moving average (`train.ema`)."""
    zero_shot: ZeroShotConfig | None = None
    """Classes of the suite `zero_shot`."""
    num_examples: int = Field(default=12, ge=0)
    """Pictures and clips shown in the report."""
    caption: CaptionEvalConfig = CaptionEvalConfig()
    """Suite `caption`."""
    needle: NeedleConfig = NeedleConfig()
    """Suite `needle`: needles of text, pictures and sound in a haystack."""
    passkey: PasskeyConfig = PasskeyConfig()
    """Suite `passkey`: a hidden number."""
    world: WorldConfig = WorldConfig()
    """Suite `world`: stories of people, places and objects, spread over a haystack."""
    sts: StsConfig = StsConfig()
    """Suite `sts`."""
    knowledge: KnowledgeConfig | None = None
    """The suite `knowledge`: questions whose answers are put into a store, changed and removed."""
    probe: ProbeConfig = ProbeConfig()
    """Suite `probe`."""
    robustness: RobustnessConfig = RobustnessConfig()
    """Suite `robustness`."""
    attribution: AttributionConfig = AttributionConfig()
    """The suite `attribution`."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.every is not None and not self.sources:
            raise ValueError(
                f"every={self.every} asks for evaluations inside training, but sources names no held-out shards"
            )
        for name, source in self.sources.items():
            if source.long_documents == "stream":
                raise ValueError(
                    f"sources.{name}.long_documents is stream, but held-out documents are read whole and in any order; use drop, truncate "
                    "or split"
                )
            if source.augment is not None:
                raise ValueError(
                    f"sources.{name}.augment is set, but held-out samples are read as they are, so that evaluations can be compared; "
                    "remove it"
                )
        return self
