"""Captioning and plain causal language modelling: `-sum log P(next token | everything before it in the document)`, with the target of
`mmctx.objectives.token_loss` under label smoothing.

A picture with a caption becomes `[picture] prompt caption <eos>`, a clip with a transcript `[clip] prompt transcript <eos>`, an
interleaved document its segments in reading order, `<eos>` behind them. Only text is predicted, media never; a prompt, and text of an
interleaved document that says `"loss": false`, is read, not predicted.

An image-conditioned language model as in Show and Tell (Vinyals et al. 2015) on a decoder alone, as in LLaVA (Liu et al. 2023), whose
instructions are masked the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mmctx.objectives.base import ids, lay_out, next_token_labels, text_column, text_of, token_counts
from mmctx.objectives.token_loss import TokenObjectiveConfig
from mmctx.pack import IGNORE_INDEX, Document, MediaItem
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class CaptioningConfig(TokenObjectiveConfig):
    """Next-token prediction on text after pictures, sounds and text."""

    kind: Literal["captioning"] = "captioning"
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` is predicted."""
    prompt: str = ""
    """Text that stands before the predicted one, and is not predicted. Interleaved documents bring their own."""
    prompt_text: int | None = Field(default=None, ge=0)
    """Which of the source's `texts` is such a prompt, as a question is to its answer; samples without it make no document."""

    @model_validator(mode="after")
    def _check(self) -> CaptioningConfig:
        if self.prompt and self.prompt_text is not None:
            raise ValueError(f"prompt {self.prompt!r} and prompt_text {self.prompt_text} are both given; keep one")
        if self.prompt_text == self.text:
            raise ValueError(f"prompt_text and text are both {self.text}: a text cannot be its own prompt")
        return self


class Captioning:
    """Data half: one causal document for each picture and clip of a plain sample, or one for an interleaved document."""

    causal, ahead, answers = True, 1, ()

    def __init__(self, name: str, config: CaptioningConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer, self.lead = name, config, tokenizer, len(tokenizer.begin)
        self._prompt = tokenizer.encode(config.prompt) if config.prompt else ids()

    def room(self, context_length: int) -> int:
        """See `DataHalf`. Two texts, each cut by itself, share what there is."""
        room = context_length - self.lead - 1 - len(self._prompt)
        return room if self.config.prompt_text is None else room // 2

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 2): picture's and clip's document; text alone and interleaved documents stand in column 0."""
        text, more = self._prompted(sizes), self.lead + 1
        media = np.stack([sizes.image_tokens, sizes.audio_tokens], axis=1)  # (n, 2)
        captions = np.where(media > 0, token_counts(text, more)[:, None] + media, 0)
        captions[text <= 0] = 0
        captions[:, 0] = np.where((media == 0).all(axis=1), token_counts(text, more), captions[:, 0])
        whole = token_counts(np.maximum(sizes.text_tokens[:, 0], 0) + media.sum(axis=1), more)
        return np.where(sizes.interleaved[:, None], np.stack([whole, np.zeros_like(whole)], axis=1), captions)

    def _prompted(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) tokens of prompt and text, 0 where one of them is lacking."""
        text = token_counts(text_column(sizes, self.config.text), len(self._prompt))
        if self.config.prompt_text is None:
            return text
        prompt = text_column(sizes, self.config.prompt_text)
        return np.where((text > 0) & (prompt > 0), text + prompt, 0)

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): every text token and the end of each document; texts without a loss count, too: the index does not tell them apart."""
        column = np.where(sizes.interleaved, sizes.text_tokens[:, 0], text_column(sizes, self.config.text))
        return (self.lengths(sizes) > 0).sum(axis=1) * (np.maximum(column, 0) + 1)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """See `DataHalf`."""
        if sample.segments is not None:
            return [self._document(sample, sample.segments, sample.learned)]
        text, prompt = text_of(sample, self.config.text), self._prompt
        if self.config.prompt_text is not None:
            prompt = text_of(sample, self.config.prompt_text)
        if text is None or prompt is None:
            return []
        media = [item for item in (sample.image, sample.audio) if item is not None]
        bodies = [(item, prompt, text) for item in media] or [(prompt, text)]
        return [self._document(sample, body, (False,) * (len(body) - 1) + (True,)) for body in bodies]

    def _document(
        self, sample: Sample, segments: Sequence[np.ndarray | MediaItem], learned: Sequence[bool] | None
    ) -> Document:
        placeholders = self.tokenizer.placeholder_ids
        input_ids, media = lay_out([self.tokenizer.begin, *segments, ids(self.tokenizer.eos_id)], placeholders)
        labels = next_token_labels(input_ids, placeholders)
        if learned is not None:
            labels[:-1][~self._is_learned(segments, learned)[1:]] = IGNORE_INDEX
        return Document(self.name, input_ids, labels, causal=True, media=media, key=sample.key)

    def _is_learned(self, segments: Sequence[np.ndarray | MediaItem], learned: Sequence[bool]) -> np.ndarray:
        """(L,) bool: tokens that may be predicted. The end of the document goes with its last segment."""
        lengths = [part.num_tokens if isinstance(part, MediaItem) else len(part) for part in segments]
        return np.repeat([False, *learned, learned[-1]], [self.lead, *lengths, 1])
