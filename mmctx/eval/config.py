"""What is measured, and on what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.datasets.config import SourceConfig


class ZeroShotConfig(StrictModel):
    """Classes that the suite `zero_shot` tells apart."""

    classes: tuple[str, ...] | dict[str, str]
    """What samples are labelled with; a mapping, such as `{n01440764: tench}`, says how each label is written in texts."""
    templates: tuple[str, ...] = ("{}",)
    """Texts that `{}` makes of a class, such as `a photo of a {}.`; write them as the captions of training are."""
    label: str = "txt"
    """Where a sample's label stands: a member's extension, or `json:dotted.path` inside `KEY.json`."""

    @property
    def names(self) -> dict[str, str]:
        """Label -> name, in the order of the classes."""
        return dict(self.classes) if isinstance(self.classes, dict) else {name: name for name in self.classes}

    @model_validator(mode="after")
    def _check(self) -> ZeroShotConfig:
        if len(self.names) < 2 or len(self.names) < len(self.classes):
            raise ValueError(f"classes must name at least two classes, each once, found {list(self.classes)}")
        if wrong := [template for template in self.templates if "{}" not in template] or not self.templates:
            raise ValueError(f"templates must each hold {{}}, where the class goes, found {wrong or 'none'}")
        return self


class EvalConfig(StrictModel):
    """Held-out evaluation."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Held-out sources, read in full, in order. None means no evaluation at the end of training."""
    suites: tuple[str, ...] = ("loss", "retrieval", "caption", "masked_lm")
    """Suites of `mmctx.eval.SUITES`, in this order."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Longest caption or transcript."""
    weights: Literal["trained", "ema"] = "trained"
    """Which weights of a checkpoint: as trained last, or their moving average (`train.ema`)."""
    zero_shot: ZeroShotConfig | None = None
    """Classes of the suite `zero_shot`."""
    num_examples: int = Field(default=12, ge=0)
    """Pictures and clips shown in the report."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        for name, source in self.sources.items():
            if source.augment is not None:
                raise ValueError(
                    f"sources.{name}.augment is set, but held-out samples are read as they are, so that evaluations can be compared; "
                    "remove it"
                )
        return self
