"""Who owns what in a packed batch: the truth that an audit holds the model against.

Taken from the documents themselves where they are at hand. A batch alone would have to be believed, and a boundary that is wrong in it
would look right.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mmctx.audit.report import Place
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaBatch, PackedBatch, first_positions


@dataclass(frozen=True, slots=True)
class Holding:
    """A media item in a document.

    Attributes:
        kind: one of `MODALITIES`.
        item: its number among the items of its kind in the batch.
        document: number of the document.
        first: position of its first embedding in the flat sequence.
        num_tokens: how many embeddings it has.
    """

    kind: str
    item: int
    document: int
    first: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Ownership:
    """Documents in the order in which they are packed, N of them, T tokens.

    Attributes:
        lengths: of the N documents.
        causal: whether each attends to the past only.
        objectives, keys: of each.
        holdings: every appearance of an item in a document.
        pooled: of each `OBJECTIVE/VIEW`, the documents of its embeddings, in order.
        labelled: of each document, the positions in the flat sequence that have a label.
    """

    lengths: tuple[int, ...]
    causal: tuple[bool, ...]
    objectives: tuple[str, ...]
    keys: tuple[str, ...]
    holdings: tuple[Holding, ...]
    pooled: Mapping[str, tuple[int, ...]]
    labelled: tuple[tuple[int, ...], ...]

    @classmethod
    def of_documents(cls, documents: Sequence[Document]) -> Ownership:
        """From what was packed, in whatever order."""
        documents = packed_order(documents)
        starts = [0, *accumulate(len(d.input_ids) for d in documents)]
        numbers: dict[str, dict[int, int]] = {kind: {} for kind in MODALITIES}  # of items, in order of first use
        holdings, pooled = [], {}
        for number, document in enumerate(documents):
            for offset, item in document.media:
                known = numbers[item.kind]
                place = known.setdefault(id(item), len(known))
                holdings.append(Holding(item.kind, place, number, starts[number] + offset, item.num_tokens))
            if document.pooled is not None and document.view is not None:
                pooled.setdefault(f"{document.objective}/{document.view}", []).append(number)
        return cls(
            lengths=tuple(len(d.input_ids) for d in documents),
            causal=tuple(d.causal for d in documents),
            objectives=tuple(d.objective for d in documents),
            keys=tuple(d.key for d in documents),
            holdings=tuple(holdings),
            pooled={name: tuple(found) for name, found in pooled.items()},
            labelled=tuple(
                tuple(start + place for place, label in enumerate(d.labels.tolist()) if label != IGNORE_INDEX)
                for d, start in zip(documents, starts, strict=False)
            ),
        )

    @classmethod
    def of_batch(cls, batch: PackedBatch) -> Ownership:
        """From a batch alone, whose layout and slots are believed."""
        ends = list(accumulate(batch.layout.lengths))
        labelled: list[list[int]] = [[] for _ in ends]
        for positions in batch.label_positions.values():
            for position in positions.tolist():
                labelled[bisect_right(ends, position)].append(position)
        holdings = [h for kind, media in batch.media.items() for h in _holdings(kind, media, ends)]
        return cls(
            lengths=batch.layout.lengths,
            causal=tuple(number < batch.layout.num_causal for number in range(len(ends))),
            objectives=batch.objectives,
            keys=batch.keys or ("",) * len(ends),
            holdings=tuple(sorted(holdings, key=lambda holding: holding.first)),
            pooled={
                name: tuple(bisect_right(ends, place) for place in first_positions(batch, name))
                for name in batch.pooled
            },
            labelled=tuple(tuple(sorted(positions)) for positions in labelled),
        )

    @property
    def starts(self) -> list[int]:
        """Position of each document's first token."""
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def fits(self, batch: PackedBatch) -> bool:
        """Whether a batch has as many tokens, embeddings and items, wherever they lie."""
        whole = all(len(places) == sum(batch.pool_sizes[name]) for name, places in batch.pooled.items())
        pooled = {name: len(batch.pool_sizes[name]) for name in batch.pooled}
        items = {kind: len(media.num_tokens) for kind, media in batch.media.items()}
        own = {kind: len(self.holders(kind)) for kind in MODALITIES if self.holders(kind)}
        views = {name: len(owners) for name, owners in self.pooled.items()}
        return batch.num_tokens == self.num_tokens and whole and pooled == views and items == own

    def document_of(self, device: torch.device) -> Tensor:
        """(T,) int64: the document of each position."""
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)

    def text(self) -> list[list[int]]:
        """Of each document, its positions that hold text, not media."""
        media = {p for h in self.holdings for p in range(h.first, h.first + h.num_tokens)}
        spans = zip(self.starts, self.lengths, strict=True)
        return [[p for p in range(start, start + length) if p not in media] for start, length in spans]

    def holders(self, kind: str) -> dict[int, list[Holding]]:
        """Where each item of a kind appears."""
        found: dict[int, list[Holding]] = {}
        for holding in self.holdings:
            if holding.kind == kind:
                found.setdefault(holding.item, []).append(holding)
        return found

    def place(self, document: int) -> Place:
        """A document's name."""
        return Place(document, self.keys[document], self.objectives[document])


def packed_order(documents: Sequence[Document]) -> list[Document]:
    """A piece of a stream first, then causal documents, as they are packed."""
    return sorted(documents, key=lambda d: (d.start is None, not d.causal))


def _holdings(kind: str, media: MediaBatch, ends: Sequence[int]) -> list[Holding]:
    first_row = {row: item for item, row in enumerate([0, *accumulate(media.num_tokens)][:-1])}
    slots = zip(media.slots.tolist(), media.rows.tolist(), strict=True)
    begins = [(slot, first_row[row]) for slot, row in slots if row in first_row]
    return [Holding(kind, item, bisect_right(ends, slot), slot, media.num_tokens[item]) for slot, item in begins]
