"""Training objectives. `KINDS` is the one place that knows them all; a run may use a kind several times under different names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

from pydantic import Field
from torch import nn

from mmctx.objectives.base import ComparingHalf, DataHalf, LossSum, ObjectiveConfig
from mmctx.objectives.captioning import Captioning, CaptioningConfig
from mmctx.objectives.classification import Classification, ClassificationConfig, ClassificationLoss
from mmctx.objectives.contrastive import SimilarityLoss
from mmctx.objectives.denoising import Denoising, DenoisingConfig
from mmctx.objectives.masked_lm import MaskedLM, MaskedLMConfig
from mmctx.objectives.next_sentence import NextSentence, NextSentenceConfig, NextSentenceLoss
from mmctx.objectives.regression import Regression, RegressionConfig, RegressionLoss
from mmctx.objectives.roster import Roster
from mmctx.objectives.similarity import Similarity, SimilarityConfig
from mmctx.objectives.token_loss import TokenLoss
from mmctx.tokenizer import TextTokenizer


class Kind(NamedTuple):
    """The two halves of an objective."""

    data: type
    model: type[nn.Module]


KINDS: dict[str, Kind] = {
    "captioning": Kind(Captioning, TokenLoss),
    "masked_lm": Kind(MaskedLM, TokenLoss),
    "similarity": Kind(Similarity, SimilarityLoss),
    "next_sentence": Kind(NextSentence, NextSentenceLoss),
    "denoising": Kind(Denoising, TokenLoss),
    "classification": Kind(Classification, ClassificationLoss),
    "regression": Kind(Regression, RegressionLoss),
}

AnyObjective = Annotated[
    CaptioningConfig
    | MaskedLMConfig
    | SimilarityConfig
    | NextSentenceConfig
    | DenoisingConfig
    | ClassificationConfig
    | RegressionConfig,
    Field(discriminator="kind"),
]


def build_data_halves(configs: Mapping[str, AnyObjective], tokenizer: TextTokenizer) -> dict[str, DataHalf]:
    """The data half of each named objective."""
    return {name: KINDS[config.kind].data(name, config, tokenizer) for name, config in configs.items()}


def build_model_halves(configs: Mapping[str, AnyObjective], width: int) -> nn.ModuleDict:
    """The model half of each named objective, with its own parameters where it has some.

    Built by name, so that the order of keys in a YAML file does not change which weights are drawn.
    """
    return nn.ModuleDict(
        {name: KINDS[config.kind].model(name, config, width) for name, config in sorted(configs.items())}
    )


__all__ = [
    "KINDS",
    "AnyObjective",
    "ComparingHalf",
    "DataHalf",
    "LossSum",
    "ObjectiveConfig",
    "Roster",
    "build_data_halves",
    "build_model_halves",
]
