"""Denoising: reconstruction of a text from a corrupted copy, `-sum log P(y_i | corrupted text, y_1 .. y_{i-1})`.

BART (Lewis et al. 2020) on a decoder alone: `[picture] corrupted text <eos> clean text <eos>` in one causal document, where only what
stands behind the first `<eos>` is predicted. The corrupted copy has its pieces in another order (sentence permutation), some tokens
deleted and some of the others masked, one by one or in spans. All are exact numbers of tokens, so that the index knows how long the
document will be: BART's infilling, which puts one mask for a span of any length, would not let it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mmctx.objectives.base import ids, lay_out, next_token_labels, token_counts
from mmctx.objectives.corruption import choose, choose_spans, exact_share, shuffle_pieces
from mmctx.objectives.neighbours import text_lengths, whole_text
from mmctx.objectives.token_loss import TokenObjectiveConfig
from mmctx.pack import IGNORE_INDEX, Document
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class DenoisingConfig(TokenObjectiveConfig):
    """Reconstruction of corrupted texts."""

    kind: Literal["denoising"] = "denoising"
    delete: float = Field(default=0.1, ge=0, lt=1)
    """Share of tokens that are left out of the corrupted copy."""
    mask: float = Field(default=0.2, ge=0, le=1)
    """Share of tokens that the mask stands for in it, of those that are left."""
    span: float | None = Field(default=None, ge=1)
    """Mean length of the runs that are masked (geometric); null masks each token for itself."""
    pieces: int = Field(default=1, ge=1)
    """Pieces that the text is cut into, at random places, and that are put in random order; 1 leaves it in order."""
    context: Literal["none", "image", "audio"] = "none"
    """What a plain sample's text is read behind."""
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` is corrupted; a document of texts alone is taken as a whole."""

    @model_validator(mode="after")
    def _check(self) -> DenoisingConfig:
        if self.delete == self.mask == 0 and self.pieces == 1:
            raise ValueError("delete 0, mask 0 and pieces 1 corrupt nothing: the text would be copied; set one of them")
        return self


class Denoising:
    """Data half: one causal document a sample; none of an interleaved document with media, whose text the index cannot tell apart."""

    causal, ahead, answers = True, 1, ()

    def __init__(self, name: str, config: DenoisingConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer, self.lead = name, config, tokenizer, len(tokenizer.begin)

    def room(self, context_length: int) -> int:
        """See `DataHalf`. A text stands there twice."""
        return (context_length - self.lead - 2) // 2

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 1)."""
        media = {"none": 0 * sizes.image_tokens, "image": sizes.image_tokens, "audio": sizes.audio_tokens}
        text = text_lengths(sizes, self.config.text)
        corrupted = text - exact_share(text, self.config.delete)
        return token_counts(text, media[self.config.context] + corrupted + self.lead + 2)[:, None]

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): the clean text and its end."""
        return token_counts(text_lengths(sizes, self.config.text), 1)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """See `DataHalf`."""
        clean = whole_text(sample, self.config.text)
        if clean is None:
            return []
        medium = {"none": None, "image": sample.image, "audio": sample.audio}[self.config.context]
        end = ids(self.tokenizer.eos_id)
        read = [part for part in (self.tokenizer.begin, medium, self.corrupt(clean, rng), end) if part is not None]
        input_ids, media = lay_out([*read, clean, end], self.tokenizer.placeholder_ids)
        labels = next_token_labels(input_ids, self.tokenizer.placeholder_ids)
        labels[: len(labels) - len(clean) - 2] = IGNORE_INDEX  # up to the state before the first <eos>
        return [Document(self.name, input_ids, labels, causal=True, media=media, key=sample.key)]

    def corrupt(self, clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n,) -> (n - floor(delete * n),): pieces shuffled, tokens deleted, others masked."""
        shuffled = shuffle_pieces(clean, self.config.pieces, rng)
        gone = choose(len(shuffled), exact_share(len(shuffled), self.config.delete), rng)
        left = np.delete(shuffled, gone.places)
        budget = exact_share(len(left), self.config.mask)
        hidden = (
            choose(len(left), budget, rng)
            if self.config.span is None
            else choose_spans(len(left), budget, self.config.span, rng)
        )
        left[hidden.places] = self.tokenizer.mask_id
        return left
