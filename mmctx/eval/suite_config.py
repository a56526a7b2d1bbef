"""Settings of the suites; those of questions in a haystack are in `haystack/config.py`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.datasets.config import SourceConfig
from mmctx.eval.corruptions import CORRUPTIONS, SEVEREST


class CaptionEvalConfig(StrictModel):
    """Suite `caption`."""

    references: tuple[int, ...] = ()
    """Texts of a source, by their number in its `texts`, that are right besides the one that the objective predicts: further captions of a
    picture. BLEU, ROUGE-L and CIDEr count them."""


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


class StsConfig(StrictModel):
    """Suite `sts`."""

    files: dict[str, str] = Field(default_factory=dict)
    """Named tables of sentence pairs with a score of how alike they are: CSV, or TSV by that ending."""
    columns: tuple[int | str, int | str, int | str] = (0, 1, 2)
    """Where both sentences and the score stand: numbers from 0, or names, which mean that the first line is a header."""


class ProbeConfig(StrictModel):
    """Suite `probe`."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Which views are classified, and where the class of each stands: a member's extension, or `json:dotted.path` inside `KEY.json`; such
    as `{image: "json:group", audio: "json:voice"}`. Views are `image`, `audio` and the source's texts `text0`, `text1`, ..."""
    train: str | SourceConfig | None = None
    """Samples to fit on: one of the run's training sources by its name, or labelled shards of their own. null: all training sources."""
    samples: int = Field(default=5000, ge=2)
    """How many of them are read at most, drawn at random."""
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 20)
    """The k of k-NN."""
    inverse_penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1e-3, 1e-2, 0.1, 1, 10, 100), min_length=1
    )
    """The C of the linear probe, one of which is chosen on a fifth of the samples to fit on."""

    @model_validator(mode="after")
    def _check(self) -> ProbeConfig:
        for view in self.labels:
            if not re.fullmatch(r"image|audio|text\d+", view):
                raise ValueError(f"labels knows the views image, audio, text0, text1, ..., not {view!r}")
        return self


class RobustnessConfig(StrictModel):
    """Suite `robustness`."""

    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    """What is done to held-out samples, each by itself."""
    severities: tuple[Annotated[int, Field(ge=1, le=SEVEREST)], ...] = tuple(range(1, SEVEREST + 1))
    """How badly: from 1 up to 5, beside 0, which is the sample as it is."""

    @model_validator(mode="after")
    def _check(self) -> RobustnessConfig:
        if unknown := [name for name in self.corruptions if name not in CORRUPTIONS]:
            raise ValueError(f"corruptions knows {', '.join(CORRUPTIONS)}, not {unknown[0]!r}")
        if list(self.severities) != sorted(set(self.severities)):
            raise ValueError(f"severities {list(self.severities)} must rise")
        return self


class LossByPositionConfig(StrictModel):
    """Suite `loss_by_position`."""

    documents: int = Field(default=64, ge=1)
    """The longest held-out documents, so many, are read with less of their context and with it shuffled."""
    targets: int = Field(default=64, ge=1)
    """What is scored there: so many predictions at the end of each."""
    kept: tuple[Annotated[int, Field(ge=1)], ...] = (16, 64, 256, 1024, 4096, 16384)
    """Tokens in front of them that stay as they are; documents that have no more are left out of that point."""


class AttributionConfig(StrictModel):
    """On which parts of a document do answers rest?"""

    documents: int = Field(default=3, ge=0)
    """Held-out documents of each kind that are looked at: with a picture, with a clip, interleaved, text alone."""
    answer_tokens: int = Field(default=12, ge=1)
    """Longest answer: the model's own, in place of a document's last text."""
    longest: int = Field(default=2048, ge=2)
    """Tokens of a document at most: the gradient keeps all layers of it."""
    steps: int = Field(default=64, ge=1)
    """Places at which integrated gradients are taken: each costs a forward and a backward pass. `gap` in the results tells
    whether they are enough."""
