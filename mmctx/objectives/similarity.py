"""Similarity of views of one sample: picture, sound and texts in one space.

Every view becomes its own document, ended by the embedding token, whose hidden state is projected and normalised. For each pair of views
the loss is the symmetric softmax over all candidates of the bin (InfoNCE, van den Oord et al. 2018; CLIP, Radford et al. 2021).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctx.objectives.base import LossSum, ObjectiveConfig, ids, lay_out, text_column, text_of, token_counts
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaItem, PackedBatch
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
    initial_temperature: float = Field(default=0.07, gt=0)
    """The learned scale starts at 1 / this, as in CLIP."""
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


class SimilarityLoss(nn.Module):
    """Model half: projection, learned scale, symmetric InfoNCE."""

    def __init__(self, name: str, config: SimilarityConfig, width: int) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.projection = nn.Linear(width, config.dim or width, bias=False)
        # shape (1,): scalars of no dimension break FSDP2
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / config.initial_temperature)))

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Unit embeddings (P, E) of the pooled positions (P,), in float32 at least."""
        projected = self.projection(hidden.index_select(0, positions))
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=-1)

    def count(self, batch: PackedBatch) -> int:
        """Number of softmaxes: two for every positive pair."""
        return sum(2 * len(pair.targets_a) for pair in self._pairs(batch))

    def forward(self, hidden: Tensor, batch: PackedBatch, head: Tensor) -> LossSum:
        """See `ModelHalf`."""
        scale = self.logit_scale.clamp(max=math.log(self.config.max_scale)).exp()
        embeddings = {
            name: self.embed(hidden, positions)
            for name, positions in batch.pooled.items()
            if name.startswith(f"{self.name}/")
        }
        parts = []
        for pair in self._pairs(batch):

            def on_device(rows: np.ndarray) -> Tensor:
                return torch.from_numpy(rows).to(hidden.device, non_blocking=True)

            a = embeddings[pair.name_a].index_select(0, on_device(pair.rows_a))  # (P_a, E)
            b = embeddings[pair.name_b].index_select(0, on_device(pair.rows_b))  # (P_b, E)
            scores = scale * a @ b.T  # (P_a, P_b)
            to_a, to_b = on_device(pair.targets_a), on_device(pair.targets_b)
            parts.append(F.cross_entropy(scores.index_select(0, to_a), to_b, reduction="sum"))
            parts.append(F.cross_entropy(scores.T.index_select(0, to_b), to_a, reduction="sum"))
        if not parts:  # still part of the graph, so that every rank has a gradient for every parameter
            parts = [(part * 0).sum() for part in (hidden, self.projection.weight, self.logit_scale)]
        return LossSum(torch.stack(parts).sum(), self.count(batch))

    def _pairs(self, batch: PackedBatch) -> list[MatchedPair]:
        named = [(f"{self.name}/{a}", f"{self.name}/{b}") for a, b in self.config.pairs]
        found = [match(a, b, batch.pairs[a], batch.pairs[b]) for a, b in named if a in batch.pairs and b in batch.pairs]
        return [pair for pair in found if len(pair.targets_a)]


class MatchedPair(NamedTuple):
    """Two views of a batch: which embeddings are candidates, and which of them belong together. Host arrays.

    Attributes:
        name_a, name_b: the views.
        rows_a, rows_b: the candidates, one for each sample; a sample that the bin holds twice must not be its own negative.
        targets_a, targets_b: candidates that are partners, place by place.
    """

    name_a: str
    name_b: str
    rows_a: np.ndarray
    rows_b: np.ndarray
    targets_a: np.ndarray
    targets_b: np.ndarray


def match(name_a: str, name_b: str, samples_a: Sequence[int], samples_b: Sequence[int]) -> MatchedPair:
    """Pairs up the embeddings of two views by the sample that each belongs to."""
    unique_a, rows_a = np.unique(np.asarray(samples_a), return_index=True)
    unique_b, rows_b = np.unique(np.asarray(samples_b), return_index=True)
    return MatchedPair(name_a, name_b, rows_a, rows_b, *matching_rows(unique_a, unique_b))


def matching_rows(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers in `a` and in `b` of the samples that stand in both, place by place; each sample's first row."""
    _, in_a, in_b = np.intersect1d(np.asarray(a), np.asarray(b), return_indices=True)
    return in_a, in_b
