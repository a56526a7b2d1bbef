"""What an objective is: a data half that runs in loader workers and a model half that runs on the device.

Adding one is one file that defines a config, a data half and a model half, and one entry in `mmctx.objectives.KINDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from mmctx.config import StrictModel
from mmctx.objectives.output_head import OutputHead
from mmctx.objectives.roster import Roster
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class ObjectiveConfig(StrictModel):
    """What every objective has."""

    weight: float = Field(default=1.0, ge=0)
    """Factor of the objective's mean loss in the total."""


class LossSum(NamedTuple):
    """A loss before division: only the trainer divides, by the count of the whole global step."""

    total: Tensor
    """Scalar, sum over the counted predictions."""
    count: int
    """How many predictions were summed, known on the host."""


class Names(Protocol):
    """Names of what labels number; empty where labels are tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, label: int, /) -> str: ...


class DataHalf(Protocol):
    """Turns samples into documents.

    Attributes:
        causal: its documents attend to the past only, or in both directions.
        lead: tokens that stand before all that a sample brings, such as `bos_token`.
        ahead: how many places before the token it predicts a label stands: 1 for next tokens, 0 for what is hidden at the place itself.
        answers: names of what labels number; empty where labels are tokens.
    """

    causal: bool
    lead: int
    ahead: int
    answers: Names

    def room(self, context_length: int) -> int:
        """Tokens that a sample's text and media may have together, so that its documents fit into the context: long ones are cut to it."""
        ...

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, documents a sample) int64 lengths of the documents that `documents` will make, 0 for none; integers only."""
        ...

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) int64 estimated number of labelled positions: what the output head will cost."""
        ...

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) int64 candidates that each sample adds to a similarity loss, 0 for other objectives."""
        ...

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """The documents of one sample.

        Args:
            sample: or a part of one that was split.
            rng: seeded by (run seed, epoch, sample).
            step: the global step that reads them, for schedules; None in evaluation, where a schedule is at its end.
        """
        ...


class ModelHalf(Protocol):
    """Turns hidden states into a loss that is a sum over documents; those that are not are a `ComparingHalf`."""

    def count(self, batch: PackedBatch) -> int:
        """How many predictions the batch holds for this objective, from host integers alone."""
        ...

    def __call__(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        """Loss of this objective's documents; hidden (T, D). Zero, but attached to the graph, if there are none."""
        ...


class ComparingHalf(nn.Module, ABC):
    """Model half of an objective whose loss is no sum over batches: it compares what all batches of the global step embed.

    Called like any model half, it compares what one batch embeds. The trainer calls its parts: `embed_batch` on each micro-batch, then
    `compare` once on all of them.
    """

    @abstractmethod
    def embed_batch(self, hidden: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        """What `compare` needs of a batch with hidden states (T, D): by `OBJECTIVE/VIEW` the (P, E) embeddings of `batch.pooled`, and under
        other names learned tensors that are the same for all batches. All depend on all parameters of this half, and on `hidden`.
        """

    @abstractmethod
    def compare(self, embedded: Mapping[str, Tensor], roster: Roster) -> Tensor:
        """This rank's share of the loss of a global step, summed: a scalar. Each rank of the roster calls it.

        Args:
            embedded: what `embed_batch` gave, embeddings of this rank's micro-batches end to end.
            roster: who embeds what.
        """

    @abstractmethod
    def count_all(self, roster: Roster) -> int:
        """How many predictions the shares of all ranks sum up, from host integers alone."""

    @abstractmethod
    def count_negatives(self, roster: Roster) -> int:
        """From how many others the predictions of `count_all` are told, summed over them."""

    def count(self, batch: PackedBatch) -> int:
        """See `ModelHalf`: of this batch alone."""
        return self.count_all(Roster.of(batch))

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        """See `ModelHalf`: of this batch alone."""
        roster = Roster.of(batch)
        return LossSum(self.compare(self.embed_batch(hidden, batch), roster), self.count_all(roster))


def lay_out(
    segments: Sequence[np.ndarray | MediaItem], placeholder_ids: Mapping[str, int]
) -> tuple[np.ndarray, tuple[tuple[int, MediaItem], ...]]:
    """Concatenates text ids and media into (L,) int64 ids with placeholders, and (offset, item) of each media item."""
    parts, media, offset = [], [], 0
    for segment in segments:
        if isinstance(segment, MediaItem):
            media.append((offset, segment))
            part = np.full(segment.num_tokens, placeholder_ids[segment.kind], dtype=np.int64)
        else:
            part = segment
        parts.append(part)
        offset += len(part)
    return np.concatenate(parts), tuple(media)


def next_token_labels(input_ids: np.ndarray, placeholder_ids: Mapping[str, int]) -> np.ndarray:
    """(L,) labels: each position predicts the next token of its document, unless that is media. The last predicts nothing."""
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[:-1] = input_ids[1:]
    for placeholder in placeholder_ids.values():  # np.isin takes longer to start than these few ids take
        labels[labels == placeholder] = IGNORE_INDEX
    return labels


def ids(*tokens: int) -> np.ndarray:
    """A segment made of single tokens."""
    return np.array(tokens, dtype=np.int64)


def token_counts(tokenizer_counts: np.ndarray, extra: int | np.ndarray) -> np.ndarray:
    """(n,) document lengths: text plus `extra` tokens, 0 where the text is absent (counted as -1) or empty."""
    return np.where(tokenizer_counts > 0, tokenizer_counts + extra, 0)


def text_column(sizes: SampleSizes, number: int) -> np.ndarray:
    """(n,) token counts of text `number`; -1 throughout where the source declares fewer texts."""
    return sizes.text_tokens[:, number] if number < sizes.text_tokens.shape[1] else np.full(len(sizes), -1)


def text_of(sample: Sample, number: int) -> np.ndarray | None:
    """Ids of text `number`; None where the sample has none, or none of any length."""
    text = sample.texts[number] if number < len(sample.texts) else None
    return text if text is not None and len(text) else None


__all__ = [
    "ComparingHalf",
    "DataHalf",
    "LossSum",
    "ModelHalf",
    "Names",
    "ObjectiveConfig",
    "TextTokenizer",
    "ids",
    "lay_out",
    "next_token_labels",
    "text_column",
    "text_of",
    "token_counts",
]
