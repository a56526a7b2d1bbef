"""Similarity of views of one sample: picture, sound and texts in one space.

Every view becomes its own document, ended by the embedding token, whose hidden state is projected and normalised. What is made of the
embeddings of a whole global step is in `contrastive`.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mmctx.objectives.base import ObjectiveConfig, ids, lay_out, text_column, text_of, token_counts
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaItem
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class SimilarityConfig(ObjectiveConfig):
    """Contrastive learning between the views of a sample."""

    kind: Literal["similarity"] = "similarity"
    pairs: tuple[tuple[str, str], ...] = (("image", "text0"), ("audio", "text0"))
    """Pairs of views to bring together: `image`, `audio`, `text0`, `text1` (the source's `texts`, counted from 0)."""
    dim: int | None = None
    """Size of the embedding; null for the trunk's width."""
    causal: bool = False
    """Views attend to the past only, or (the default) in both directions."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over all candidates (InfoNCE, as CLIP), or a `sigmoid` for each pair (as SigLIP)."""
    negatives: Literal["all", "source"] = "all"
    """Which candidates of the global step a view is compared with: all, or those of its own source alone."""
    initial_temperature: float = Field(default=0.07, gt=0)
    """The learned scale starts at 1 / this, as in CLIP; SigLIP starts at 0.1."""
    initial_bias: float = -10.0
    """Where the learned bias of the sigmoid starts, as in SigLIP."""
    max_scale: float = Field(default=100.0, gt=0)
    """The learned scale is capped here."""

    @model_validator(mode="after")
    def _check(self) -> SimilarityConfig:
        if not self.pairs:
            raise ValueError("pairs must name at least one pair of views, for example [[image, text0]]")
        for view in self.views:
            if view not in MODALITIES and not re.fullmatch(r"text\d+", view):
                raise ValueError(f"pairs knows the views image, audio, text0, text1, ..., not {view!r}")
        return self

    @property
    def views(self) -> tuple[str, ...]:
        """All views that some pair uses, each once."""
        return tuple(dict.fromkeys(view for pair in self.pairs for view in pair))


class Similarity:
    """Data half: one document a view. A sample with fewer than two of the views makes none; nor does an interleaved document."""

    def __init__(self, name: str, config: SimilarityConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.causal = config.causal

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, number of views)."""
        lengths = np.stack([self._view_lengths(sizes, view) for view in self.config.views], axis=1)
        alone = (lengths > 0).sum(axis=1) < 2
        lengths[alone | sizes.interleaved] = 0
        return lengths

    def _view_lengths(self, sizes: SampleSizes, view: str) -> np.ndarray:
        media = {"image": sizes.image_tokens, "audio": sizes.audio_tokens}
        if view in media:
            return token_counts(media[view], 1)
        return token_counts(text_column(sizes, int(view.removeprefix("text"))), 1)

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros: embeddings pass no output head."""
        return np.zeros(len(sizes), np.int64)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): one for each sample that has views to compare."""
        return np.asarray((self.lengths(sizes) > 0).any(axis=1), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator) -> list[Document]:
        """See `DataHalf`."""
        if sample.segments is not None:
            return []
        views = {view: part for view in self.config.views if (part := _view(sample, view)) is not None}
        if len(views) < 2:
            return []
        return [self._document(sample, view, part) for view, part in views.items()]

    def _document(self, sample: Sample, view: str, part: np.ndarray | MediaItem) -> Document:
        input_ids, media = lay_out([part, ids(self.tokenizer.embed_id)], self.tokenizer.placeholder_ids)
        return Document(
            objective=self.name,
            input_ids=input_ids,
            labels=np.full_like(input_ids, IGNORE_INDEX),
            causal=self.config.causal,
            media=media,
            pooled=len(input_ids) - 1,
            view=view,
            pair=sample.uid,
            key=sample.key,
        )


def _view(sample: Sample, view: str) -> np.ndarray | MediaItem | None:
    media = {"image": sample.image, "audio": sample.audio}
    if view in media:
        return media[view]
    return text_of(sample, int(view.removeprefix("text")))
