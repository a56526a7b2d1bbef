"""Captioning and plain causal language modelling: `-sum log P(next token | everything before it in the document)`.

A picture with a caption becomes `[picture] caption <eos>`, a clip with a transcript `[clip] transcript <eos>`, an interleaved document
its segments in reading order. Only text is predicted, media never; text of an interleaved document that
says `"loss": false` is read, not predicted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from mmctx.objectives.base import (
    LossSum,
    ObjectiveConfig,
    ids,
    lay_out,
    next_token_labels,
    text_column,
    text_of,
    token_counts,
)
from mmctx.objectives.linear_cross_entropy import linear_cross_entropy
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class CaptioningConfig(ObjectiveConfig):
    """Next-token prediction on text after pictures, sounds and text."""

    kind: Literal["captioning"] = "captioning"
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` is predicted."""


class Captioning:
    """Data half: one causal document for each picture and clip of a plain sample, or one for an interleaved document."""

    def __init__(self, name: str, config: CaptioningConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.causal = True

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 2): picture's and clip's document; text alone and interleaved documents stand in column 0."""
        text = text_column(sizes, self.config.text)
        media = np.stack([sizes.image_tokens, sizes.audio_tokens], axis=1)  # (n, 2)
        captions = np.where(media > 0, token_counts(text, 1)[:, None] + media, 0)
        captions[text <= 0] = 0
        captions[:, 0] = np.where((media == 0).all(axis=1), token_counts(text, 1), captions[:, 0])
        whole = token_counts(np.maximum(sizes.text_tokens[:, 0], 0) + media.sum(axis=1), 1)
        return np.where(sizes.interleaved[:, None], np.stack([whole, np.zeros_like(whole)], axis=1), captions)

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): every text token and the end of each document; texts without a loss count, too: the index does not tell them apart."""
        column = np.where(sizes.interleaved, sizes.text_tokens[:, 0], text_column(sizes, self.config.text))
        return (self.lengths(sizes) > 0).sum(axis=1) * (np.maximum(column, 0) + 1)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator) -> list[Document]:
        """See `DataHalf`."""
        if sample.segments is not None:
            return [self._document(sample, list(sample.segments))]
        text = text_of(sample, self.config.text)
        if text is None:
            return []
        media = [item for item in (sample.image, sample.audio) if item is not None]
        return [self._document(sample, [item, text]) for item in media] or [self._document(sample, [text])]

    def _document(self, sample: Sample, segments: list) -> Document:
        placeholders = self.tokenizer.placeholder_ids
        input_ids, media = lay_out([*segments, ids(self.tokenizer.eos_id)], placeholders)
        labels = next_token_labels(input_ids, placeholders)
        if sample.learned is not None:
            labels[:-1][~_is_learned(sample, segments)[1:]] = IGNORE_INDEX
        return Document(self.name, input_ids, labels, causal=True, media=media, key=sample.key)


def _is_learned(sample: Sample, segments: list) -> np.ndarray:
    """(L,) bool: tokens that may be predicted. The end of the document goes with its last segment."""
    assert sample.learned is not None
    lengths = [part.num_tokens if isinstance(part, MediaItem) else len(part) for part in segments]
    return np.repeat([*sample.learned, sample.learned[-1]], [*lengths, 1])


class TokenLoss(nn.Module):
    """Model half of objectives that predict tokens: cross entropy at this objective's labelled positions, nowhere else."""

    def __init__(self, name: str, config: ObjectiveConfig, width: int) -> None:
        super().__init__()
        self.name = name

    def count(self, batch: PackedBatch) -> int:
        """Labelled positions."""
        return len(batch.label_positions.get(self.name, ()))

    def forward(self, hidden: Tensor, batch: PackedBatch, head: Tensor) -> LossSum:
        """See `ModelHalf`."""
        positions = batch.label_positions.get(self.name)
        if positions is None:
            return LossSum((hidden * 0).sum() + (head * 0).sum(), 0)
        labels = batch.labels.index_select(0, positions)
        return LossSum(linear_cross_entropy(hidden.index_select(0, positions), head, labels), self.count(batch))
