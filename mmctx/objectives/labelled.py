"""What `classification` and `regression` share: one document a sample, and a label that its json member holds.

The document is the sample's texts, `<embed>` behind each, perhaps with its picture or clip in front; or an interleaved document's segments
in reading order and `<embed>`. Its embedding is the state of the last token, or the mean over all of its own: `pooling`.

Shapes: T tokens, D width, N documents, K labelled ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from mmctx.errors import SampleError
from mmctx.objectives.base import LossSum, Names, ObjectiveConfig, ids, lay_out, text_column, text_of, token_counts
from mmctx.objectives.output_head import OutputHead
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class LabelledConfig(ObjectiveConfig):
    """What objectives have whose labels stand beside the sample."""

    label: str
    """Where the label stands: a dotted path inside `KEY.json`."""
    texts: tuple[int, ...] = (0,)
    """Which of the source's `texts` are read, one after the other: `[0, 1]` for a pair of sentences, `[]` for a medium alone. Samples that
    lack one make no document. Interleaved documents bring their own."""
    context: Literal["none", "image", "audio"] = "none"
    """What a plain sample's texts are read beside. An interleaved document keeps all its media."""
    pooling: Literal["token", "mean"] = "token"
    """The label is read off the state of an embedding token at the end, or off the mean over the states of all tokens."""
    causal: bool = False
    """Tokens attend to the past only, or (the default) in both directions."""

    @model_validator(mode="after")
    def _read_something(self) -> LabelledConfig:
        if not self.texts and self.context == "none":
            raise ValueError(
                "texts is empty and context is none: there is nothing to read; name a text, or image or audio"
            )
        return self


class Labelled(ABC):
    """Data half: one document a sample, its label at the last position."""

    ahead = 0
    answers: Names = ()

    def __init__(self, name: str, config: LabelledConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer, self.causal = name, config, tokenizer, config.causal
        self.lead = len(tokenizer.begin)

    @abstractmethod
    def number(self, value: Any) -> int:
        """The integer that stands for a label in a batch.

        Args:
            value: as the json member has it.

        Raises:
            SampleError: it is none.
        """

    def room(self, context_length: int) -> int:
        """See `DataHalf`. Several texts, each cut by itself, share what there is."""
        count = max(len(self.config.texts), 1)
        return (context_length - self.lead - count) // count

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, 1): an embedding token behind each text, or behind the medium; 0 where a text is lacking, or the medium without any."""
        media = {"none": 0 * sizes.image_tokens, "image": sizes.image_tokens, "audio": sizes.audio_tokens}
        beside = media[self.config.context]
        columns = [text_column(sizes, number) for number in self.config.texts]
        plain = beside + sum(column + 1 for column in columns) if columns else beside + 1
        complete = np.all([column > 0 for column in columns], axis=0) if columns else beside > 0
        whole = np.maximum(sizes.text_tokens[:, 0], 0) + sizes.image_tokens + sizes.audio_tokens
        plain, whole = np.where(complete, plain + self.lead, 0), token_counts(whole, self.lead + 1)
        return np.where(sizes.interleaved, whole, plain)[:, None]

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros: a few numbers do not pass the output head."""
        return np.zeros(len(sizes), np.int64)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(sizes), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """See `DataHalf`.

        Raises:
            SampleError: ``bad_json``: there is no label, or it is none of those that are known.
        """
        parts = self._parts(sample, ids(self.tokenizer.embed_id))
        if not parts:
            return []
        input_ids, slots = lay_out([self.tokenizer.begin, *parts], self.tokenizer.placeholder_ids)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        labels[-1] = self._label(sample)
        return [Document(self.name, input_ids, labels, causal=self.causal, media=slots, key=sample.key)]

    def _parts(self, sample: Sample, ending: np.ndarray) -> list[np.ndarray | MediaItem]:
        """What the document is made of; nothing where it cannot be made."""
        if sample.segments is not None:
            return [*sample.segments, ending]
        texts = [text_of(sample, number) for number in self.config.texts]
        beside = {"none": None, "image": sample.image, "audio": sample.audio}[self.config.context]
        parts = [part for text in texts if text is not None for part in (text, ending)]
        if len(parts) < 2 * len(texts) or not (texts or beside):
            return []
        return [*([beside] if beside else []), *(parts or [ending])]

    def _label(self, sample: Sample) -> int:
        value = sample.fact(self.config.label)
        try:
            return self.number(value)
        except SampleError as error:
            raise SampleError(
                error.reason, f"objectives.{self.name}.label={self.config.label}: {error.detail}"
            ) from None


class LabelledLoss(nn.Module, ABC):
    """Model half: a linear probe of each document's embedding."""

    def __init__(self, name: str, config: LabelledConfig, width: int, outputs: int) -> None:
        super().__init__()
        self.name, self.pooling = name, config.pooling
        self.probe = nn.Linear(width, outputs)

    def scores(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """(K, outputs), in float32 at least, of hidden states (T, D), documents in the order of their labels."""
        positions = batch.label_positions[self.name]
        states = hidden.index_select(0, positions) if self.pooling == "token" else mean_states(hidden, batch, positions)
        scores = self.probe(states)
        return scores if scores.dtype == torch.float64 else scores.float()

    def targets(self, batch: PackedBatch) -> Tensor:
        """(K,) int64, what `Labelled.number` gave."""
        return batch.labels.index_select(0, batch.label_positions[self.name])

    def count(self, batch: PackedBatch) -> int:
        """Documents."""
        return len(batch.label_positions.get(self.name, ()))

    @abstractmethod
    def penalty(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Loss of scores (K, outputs) against targets (K,), a scalar: summed over documents."""

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        """See `ModelHalf`."""
        if self.name not in batch.label_positions:
            return LossSum((hidden * 0).sum() + sum((p * 0).sum() for p in self.parameters()), 0)
        return LossSum(self.penalty(self.scores(hidden, batch), self.targets(batch)), self.count(batch))


def mean_states(hidden: Tensor, batch: PackedBatch, positions: Tensor) -> Tensor:
    """(K, D), in float32 at least: the mean over hidden states (T, D) of each document that one of `positions` (K,) lies in.

    Never asks the device.
    """
    precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bounds = batch.layout.cu_seqlens.long()  # (N + 1,)
    documents = torch.searchsorted(bounds[1:], positions, right=True)  # (K,)
    row = torch.full_like(bounds, len(positions))  # what nobody asks for is added up in one row more
    row[documents] = torch.arange(len(positions), device=row.device)
    places = torch.arange(len(hidden), device=row.device)
    owner = row[torch.searchsorted(bounds[1:], places, right=True)]  # (T,)
    sums = hidden.new_zeros(len(positions) + 1, hidden.shape[1], dtype=precision)
    sums = sums.index_add(0, owner, hidden.to(precision))[: len(positions)]
    return sums / (bounds[documents + 1] - bounds[documents])[:, None]
