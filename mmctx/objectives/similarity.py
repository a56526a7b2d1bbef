"""Similarity of views of one sample: picture, sound and texts in one space.

Every view becomes its own document, ended by the embedding token, whose hidden state is projected and normalised. For each pair of views
the loss is the symmetric softmax over all candidates of the bin (InfoNCE, van den Oord et al. 2018; CLIP, Radford et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctx.objectives.base import LossSum, ObjectiveConfig, ids, lay_out, token_counts
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch
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
    initial_temperature: float = Field(0.07, gt=0)
    """The learned scale starts at 1 / this, as in CLIP."""
    max_scale: float = Field(100.0, gt=0)
    """The learned scale is capped here."""

    @property
    def views(self) -> tuple[str, ...]:
        """All views that some pair uses, each once."""
        return tuple(dict.fromkeys(view for pair in self.pairs for view in pair))


class Similarity:
    """Data half: one document a view. A sample with fewer than two of the views makes none; nor does an interleaved document."""

    def __init__(self, name: str, config: SimilarityConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer

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
        column = _text_index(view)
        if column >= sizes.text_tokens.shape[1]:
            return np.zeros(len(sizes), dtype=np.int64)
        return token_counts(sizes.text_tokens[:, column], 1)

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


def _text_index(view: str) -> int:
    prefix, index = view[:4], view[4:]
    if prefix != "text" or not index.isdigit():
        raise ValueError(f"objectives: similarity knows the views image, audio, text0, text1, ..., not {view!r}")
    return int(index)


def _view(sample: Sample, view: str) -> np.ndarray | MediaItem | None:
    media = {"image": sample.image, "audio": sample.audio}
    if view in media:
        return media[view]
    index = _text_index(view)
    text = sample.texts[index] if index < len(sample.texts) else None
    return text if text is not None and len(text) else None


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
        found = [
            (batch.pairs[a], batch.pairs[b]) for a, b in self.config.pairs if a in batch.pairs and b in batch.pairs
        ]
        return sum(2 * len(matching_rows(a, b)[0]) for a, b in found)

    def forward(self, hidden: Tensor, batch: PackedBatch, head: Tensor) -> LossSum:
        """See `ModelHalf`."""
        embeddings = {view: self.embed(hidden, positions) for view, positions in batch.pooled.items()}
        scale = self.logit_scale.clamp(max=math.log(self.config.max_scale)).exp()
        parts = []
        for a, b in self.config.pairs:
            if a not in embeddings or b not in embeddings:
                continue
            in_a, in_b = matching_rows(batch.pairs[a], batch.pairs[b])
            if not len(in_a):
                continue
            rows_a, rows_b = (torch.from_numpy(rows).to(hidden.device, non_blocking=True) for rows in (in_a, in_b))
            scores = scale * embeddings[a] @ embeddings[b].T  # (P_a, P_b)
            parts.append(F.cross_entropy(scores[rows_a], rows_b, reduction="sum"))
            parts.append(F.cross_entropy(scores.T[rows_b], rows_a, reduction="sum"))
        if not parts:  # still part of the graph, so that every rank has a gradient for every parameter
            parts = [(part * 0).sum() for part in (hidden, self.projection.weight, self.logit_scale)]
        return LossSum(torch.stack(parts).sum(), self.count(batch))


def matching_rows(a: Sequence[int], b: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers in `a` and in `b` of the pair ids that stand in both."""
    _, in_a, in_b = np.intersect1d(np.asarray(a), np.asarray(b), return_indices=True)
    return in_a, in_b
