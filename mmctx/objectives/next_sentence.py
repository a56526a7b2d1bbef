"""Next sentence prediction: do two spans follow each other? `-sum y log p + (1 - y) log(1 - p)`, p = sigmoid(w . h + b).

One bidirectional document holds both, `span a <eos> span b <embed>`, and h is the state of its embedding token. With `marks: cls` it is
`[CLS] span a [SEP] span b [SEP]` and h = tanh(V s + c), s the state of the first token: how BERT's weights know pairs.

In BERT (Devlin et al. 2019) the other half of the pairs has a second span of another document. A data half sees one sample at a time (a
step must stay a pure function of its number), so here it comes from the same document: from a `distant` place, which is harder, because the
topic does not give it away; or it is the same pair `swapped`, the sentence order prediction of ALBERT (Lan et al. 2020). Both spans have
the same length, known from the text's: nothing but what they say tells the classes apart.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmctx.objectives.base import LossSum, ObjectiveConfig, ids
from mmctx.objectives.neighbours import text_lengths, whole_text
from mmctx.objectives.output_head import OutputHead
from mmctx.pack import IGNORE_INDEX, Document, PackedBatch
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class NextSentenceConfig(ObjectiveConfig):
    """Whether the second of two spans of a text follows the first."""

    kind: Literal["next_sentence"] = "next_sentence"
    negatives: Literal["distant", "swapped"] = "distant"
    """Pairs that do not follow each other: spans of one text with at least a span's length between them, in either order, or neighbours in
    the wrong order. One half of the pairs, drawn anew each epoch."""
    span_tokens: int | None = Field(default=None, ge=1)
    """Longest span; null takes a third of the text (`distant`), or a half (`swapped`)."""
    marks: Literal["embed", "cls"] = "embed"
    """What stands around the spans, and which state is read."""
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` the spans are taken from; a document of texts alone is taken as a whole."""


class NextSentence:
    """Data half: one bidirectional document a sample. An interleaved document with media makes none."""

    causal, ahead = False, 0
    answers = ("not next", "next")

    def __init__(self, name: str, config: NextSentenceConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self._share = {"distant": 3, "swapped": 2}[config.negatives]
        self._cls = tokenizer.require_cls(f"objectives.{name}.marks") if config.marks == "cls" else None
        self._begin = tokenizer.begin if self._cls is None else ids(self._cls)
        self.lead = len(self._begin)
        self._num_marks = self.lead + 2

    def room(self, context_length: int) -> int:
        """See `DataHalf`."""
        return context_length - self._num_marks

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 1): two spans and the tokens around them; 0 where the text is too short."""
        span = self._span(text_lengths(sizes, self.config.text))
        return np.where(span > 0, 2 * span + self._num_marks, 0)[:, None]

    def _span(self, length):
        """Tokens of each span of a text, an integer or an array."""
        longest = length if self.config.span_tokens is None else self.config.span_tokens
        return np.minimum(np.maximum(length, 0) // self._share, longest)

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros: a single number does not pass the output head."""
        return np.zeros(len(sizes), np.int64)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """See `DataHalf`."""
        text = whole_text(sample, self.config.text)
        span = 0 if text is None else int(self._span(len(text)))
        if text is None or not span:
            return []
        follows = int(rng.integers(2))
        first, second = self._places(len(text), span, bool(follows), rng)
        a, b = text[first : first + span], text[second : second + span]
        between = ids(self.tokenizer.eos_id)
        if self._cls is None:
            input_ids, place = np.concatenate([self._begin, a, between, b, ids(self.tokenizer.embed_id)]), -1
        else:
            input_ids, place = np.concatenate([self._begin, a, between, b, between]), 0
        labels = np.full_like(input_ids, IGNORE_INDEX)
        labels[place] = follows
        return [Document(self.name, input_ids, labels, causal=False, key=sample.key)]

    def _places(self, length: int, span: int, follows: bool, rng: np.random.Generator) -> tuple[int, int]:
        """Where the two spans start."""
        apart = span
        if not follows and self.config.negatives == "distant":
            apart = int(rng.integers(2 * span, length - span + 1))
        first = int(rng.integers(0, length - span - apart + 1))
        backwards = not follows and (self.config.negatives == "swapped" or bool(rng.integers(2)))
        return (first + apart, first) if backwards else (first, first + apart)


class NextSentenceLoss(nn.Module):
    """Model half: a linear probe of the embedding token's state, behind BERT's pooler with `marks: cls`."""

    def __init__(self, name: str, config: NextSentenceConfig, width: int) -> None:
        super().__init__()
        self.name = name
        self.pooler = nn.Linear(width, width) if config.marks == "cls" else None
        self.probe = nn.Linear(width, 1)

    def scores(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """(P,) log-odds that the second span follows, in float32 at least, of the documents in the order of their labels."""
        states = hidden.index_select(0, batch.label_positions[self.name])  # (P, D)
        states = states if self.pooler is None else self.pooler(states).tanh()
        scores = self.probe(states)[:, 0]
        return scores if scores.dtype == torch.float64 else scores.float()

    def count(self, batch: PackedBatch) -> int:
        """Documents."""
        return len(batch.label_positions.get(self.name, ()))

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        """See `ModelHalf`."""
        positions = batch.label_positions.get(self.name)
        if positions is None:
            return LossSum((hidden * 0).sum() + sum((p * 0).sum() for p in self.parameters()), 0)
        scores = self.scores(hidden, batch)
        labels = batch.labels.index_select(0, positions).to(scores.dtype)
        return LossSum(F.binary_cross_entropy_with_logits(scores, labels, reduction="sum"), self.count(batch))
