"""Masked language modelling: `-sum log P(y_i | x without y_i)` over hidden positions i, with a picture or a clip beside the text where
wished.

By default as in BERT (Devlin et al. 2019): the document attends in both directions and the state at a hidden position predicts what was
there. `predict_from: before` asks the state one place before instead, as the pretrained head of a causal model does: MNTP, masked next
token prediction (LLM2Vec, BehnamGhader et al. 2024), which turns a causal model into one that reads both ways. With `attention: causal` a
state sees the past alone, part of it hidden. `span` hides runs of tokens as in SpanBERT (Joshi et al. 2020), and `rate` may follow the
step, from much to little as in Ankner et al. (2024).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.objectives.base import ids, lay_out, text_column, text_of, token_counts
from mmctx.objectives.corruption import Spans, choose_spans
from mmctx.objectives.token_loss import TokenObjectiveConfig
from mmctx.pack import IGNORE_INDEX, Document
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class RateSchedule(StrictModel):
    """A share that moves in a straight line with the global step, and stays at its end."""

    start: float = Field(gt=0, le=1)
    """At step 0."""
    end: float = Field(gt=0, le=1)
    """From step `steps` on, and in evaluation."""
    steps: int = Field(ge=1)
    """Steps on the way."""

    def at(self, step: int | None) -> float:
        """The share at a step; None for its end."""
        done = self.steps if step is None else min(step, self.steps)
        return self.start + (self.end - self.start) * done / self.steps


class MaskedLMConfig(TokenObjectiveConfig):
    """Prediction of hidden text tokens."""

    kind: Literal["masked_lm"] = "masked_lm"
    rate: float | RateSchedule = 0.15
    """Share of text tokens to predict, or `{start, end, steps}`; every document has at least one."""
    span: float | None = Field(default=None, ge=1)
    """Mean length of the runs of text tokens that are hidden together (geometric, SpanBERT has 3.8); null hides each token for itself.
    Media take no part: a run goes on behind them."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether documents attend in both directions or to the past alone."""
    predict_from: Literal["place", "before"] | None = None
    """Which state predicts a hidden token: the one at its `place`, or the one `before` it (MNTP). null: `place`, in causal documents
    `before`."""
    context: Literal["none", "image", "audio"] = "none"
    """What a plain sample's text is read beside. An interleaved document keeps all its media."""
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` is masked."""
    marks: Literal["none", "cls"] = "none"
    """`cls` puts the tokenizer's `[CLS]` before a document and its end of text (`[SEP]`) behind, as BERT's weights know texts."""

    @model_validator(mode="after")
    def _check(self) -> MaskedLMConfig:
        if isinstance(self.rate, float) and not 0 < self.rate <= 1:
            raise ValueError(f"rate {self.rate} is no share of the text: it lies above 0, up to 1")
        return self

    def rate_at(self, step: int | None) -> float:
        """Share of text tokens to predict at a global step; None where no step reads them, as in evaluation."""
        return self.rate.at(step) if isinstance(self.rate, RateSchedule) else self.rate

    @property
    def largest_rate(self) -> float:
        """The largest share of any step, by which work is estimated: the plan packs samples before it knows their step."""
        return max(self.rate.start, self.rate.end) if isinstance(self.rate, RateSchedule) else self.rate


class MaskedLM:
    """Data half: one document a sample."""

    answers = ()

    def __init__(self, name: str, config: MaskedLMConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.causal = config.attention == "causal"
        before = self.causal if config.predict_from is None else config.predict_from == "before"
        self.ahead = int(before)
        self._marks = tokenizer.begin, ids()
        if config.marks == "cls":
            self._marks = ids(tokenizer.require_cls(f"objectives.{name}.marks")), ids(tokenizer.eos_id)
        self.lead = len(self._marks[0])
        self._num_marks = sum(map(len, self._marks))

    def room(self, context_length: int) -> int:
        """See `DataHalf`."""
        return context_length - 1 - self._num_marks

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 1)."""
        media = {"none": 0 * sizes.image_tokens, "image": sizes.image_tokens, "audio": sizes.audio_tokens}[
            self.config.context
        ]
        plain = token_counts(text_column(sizes, self.config.text), media)
        whole = token_counts(sizes.text_tokens[:, 0], sizes.image_tokens + sizes.audio_tokens)
        lengths = np.where(sizes.interleaved, whole, plain)
        return (lengths + self._num_marks * (lengths > 0))[:, None]

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): the masked share of the text, one at least."""
        column = np.where(sizes.interleaved, sizes.text_tokens[:, 0], text_column(sizes, self.config.text))
        thousandths = round(1000 * self.config.largest_rate)
        return np.where(self.lengths(sizes)[:, 0] > 0, np.maximum(column, 1) * thousandths // 1000 + 1, 0)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """See `DataHalf`."""
        if sample.segments is not None:
            segments = list(sample.segments)
        else:
            text = text_of(sample, self.config.text)
            beside = {"none": None, "image": sample.image, "audio": sample.audio}[self.config.context]
            segments = [part for part in (beside, text) if part is not None] if text is not None else []
        if not any(isinstance(part, np.ndarray) and len(part) for part in segments):
            return []
        marked = [self._marks[0], *segments, self._marks[1]]
        clean, media = lay_out(marked, self.tokenizer.placeholder_ids)
        input_ids, labels = self._mask(clean, rng, step)
        return [Document(self.name, input_ids, labels, causal=self.causal, media=media, key=sample.key)]

    def _mask(
        self, clean: np.ndarray, rng: np.random.Generator, step: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Hides a share of the ordinary text: 80% of it become the mask, 10% another word of the vocabulary, 10% stay; spans as a whole."""
        words = np.flatnonzero(self.tokenizer.is_word[clean])
        words = words[words >= self.ahead]  # no state stands before the first token
        labels = np.full_like(clean, IGNORE_INDEX)
        if not len(words):
            return clean.copy(), labels
        found = self._choose(len(words), self.config.rate_at(step), rng)
        chosen = words[found.places]
        labels[chosen - self.ahead] = clean[chosen]
        fate = rng.random(found.count)[found.owner]
        replacement = rng.choice(self.tokenizer.word_ids, size=len(chosen))
        input_ids = clean.copy()
        input_ids[chosen] = np.where(
            fate < 0.8, self.tokenizer.mask_id, np.where(fate < 0.9, replacement, clean[chosen])
        )
        return input_ids, labels

    def _choose(self, num_words: int, rate: float, rng: np.random.Generator) -> Spans:
        """Words to hide, one at least: each by itself with this probability, or that share of them in spans."""
        if self.config.span is not None:
            budget = int(rate * num_words + rng.random())  # of the right mean, whatever the length
            return choose_spans(num_words, max(budget, 1), self.config.span, rng)
        chosen = np.flatnonzero(rng.random(num_words) < rate)
        if not len(chosen):
            chosen = rng.choice(num_words, size=1)
        return Spans(chosen, np.arange(len(chosen)), len(chosen))
