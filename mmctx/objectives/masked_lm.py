"""Masked language modelling (Devlin et al. 2019): `-sum log P(y_i | x without y_i)` over masked positions of a document that attends in
both directions, with a picture or a clip beside the text where wished.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from mmctx.objectives.base import ObjectiveConfig, lay_out, text_column, text_of, token_counts
from mmctx.pack import IGNORE_INDEX, Document
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class MaskedLMConfig(ObjectiveConfig):
    """Prediction of hidden text tokens from both sides."""

    kind: Literal["masked_lm"] = "masked_lm"
    rate: float = Field(default=0.15, gt=0, le=1)
    """Share of text tokens to predict; every document has at least one."""
    context: Literal["none", "image", "audio"] = "none"
    """What a plain sample's text is read beside. An interleaved document keeps all its media."""
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` is masked."""


class MaskedLM:
    """Data half: one bidirectional document a sample."""

    def __init__(self, name: str, config: MaskedLMConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.causal = False

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 1)."""
        media = {"none": 0 * sizes.image_tokens, "image": sizes.image_tokens, "audio": sizes.audio_tokens}[
            self.config.context
        ]
        plain = token_counts(text_column(sizes, self.config.text), media)
        whole = token_counts(sizes.text_tokens[:, 0], sizes.image_tokens + sizes.audio_tokens)
        return np.where(sizes.interleaved, whole, plain)[:, None]

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): the masked share of the text, one at least."""
        column = np.where(sizes.interleaved, sizes.text_tokens[:, 0], text_column(sizes, self.config.text))
        thousandths = round(1000 * self.config.rate)
        return np.where(self.lengths(sizes)[:, 0] > 0, np.maximum(column, 1) * thousandths // 1000 + 1, 0)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator) -> list[Document]:
        """See `DataHalf`."""
        if sample.segments is not None:
            segments = list(sample.segments)
        else:
            text = text_of(sample, self.config.text)
            beside = {"none": None, "image": sample.image, "audio": sample.audio}[self.config.context]
            segments = [part for part in (beside, text) if part is not None] if text is not None else []
        if not any(isinstance(part, np.ndarray) and len(part) for part in segments):
            return []
        clean, media = lay_out(segments, self.tokenizer.placeholder_ids)
        input_ids, labels = self._mask(clean, rng)
        return [Document(self.name, input_ids, labels, causal=False, media=media, key=sample.key)]

    def _mask(self, clean: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Hides a share of the ordinary text: 80% become the mask, 10% another word of the vocabulary, 10% stay."""
        words = np.flatnonzero(self.tokenizer.is_word[clean])
        if not len(words):
            return clean.copy(), np.full_like(clean, IGNORE_INDEX)
        chosen = words[rng.random(len(words)) < self.config.rate]
        if not len(chosen):
            chosen = rng.choice(words, size=1)
        labels = np.full_like(clean, IGNORE_INDEX)
        labels[chosen] = clean[chosen]
        fate = rng.random(len(chosen))
        replacement = rng.choice(self.tokenizer.word_ids, size=len(chosen))
        input_ids = clean.copy()
        input_ids[chosen] = np.where(
            fate < 0.8, self.tokenizer.mask_id, np.where(fate < 0.9, replacement, clean[chosen])
        )
        return input_ids, labels
