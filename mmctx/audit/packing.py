"""Is the packed batch what its documents are? Integers and pixels on the host, compared exactly; the model is not needed.

What a packer mixes up, no perturbation of the batch can show: a label that belongs to the next document stays where it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from mmctx.audit.ownership import packed_order
from mmctx.pack import IGNORE_INDEX, Document, PackedBatch


class Mismatch(NamedTuple):
    """Something in the batch that its document has not.

    Attributes:
        document: its number.
        what: part of the batch.
        number: how many positions, rows or other entries differ.
    """

    document: int
    what: str
    number: int


PARTS = ("boundaries", "input_ids", "labels", "position_ids", "objectives", "label_positions", "pooled", "media")
"""What is compared for each document."""


def mismatches(batch: PackedBatch, documents: Sequence[Document]) -> list[Mismatch]:
    """Compares a batch on the CPU with the documents that it was packed from. None: it holds them, all of them, and nothing else."""
    documents = packed_order(documents)
    starts = [0, *accumulate(len(d.input_ids) for d in documents)]
    if len(batch.input_ids) != starts[-1]:
        return [Mismatch(0, "boundaries", abs(len(batch.input_ids) - starts[-1]))]
    compare: dict[str, Callable[[PackedBatch, Sequence[Document], list[int]], Iterator[int]]] = {
        "boundaries": _boundaries,
        "input_ids": lambda b, d, s: _arrays(b.input_ids, [x.input_ids for x in d], s),
        "labels": lambda b, d, s: _arrays(b.labels, [x.labels for x in d], s),
        "position_ids": lambda b, d, s: _arrays(
            b.position_ids, [np.arange(len(x.input_ids)) + (x.start or 0) for x in d], s
        ),
        "objectives": _objectives,
        "label_positions": _label_positions,
        "pooled": _pooled,
        "media": _media,
    }
    return [
        Mismatch(document, what, number)
        for what in PARTS
        for document, number in enumerate(compare[what](batch, documents, starts))
        if number
    ]


def _boundaries(batch: PackedBatch, documents: Sequence[Document], starts: list[int]) -> Iterator[int]:
    layout, bounds = batch.layout, batch.layout.cu_seqlens.tolist()
    for number, document in enumerate(documents):
        start, end = starts[number], starts[number + 1]
        there = bounds[number : number + 2] == [start, end] and layout.lengths[number : number + 1] == (end - start,)
        yield int(not there) + int(document.causal != (number < layout.num_causal))


def _arrays(packed: torch.Tensor, own: Sequence[np.ndarray], starts: list[int]) -> Iterator[int]:
    values = packed.numpy()
    for start, array in zip(starts, own, strict=False):
        yield int((values[start : start + len(array)] != array).sum())


def _objectives(batch: PackedBatch, documents: Sequence[Document], starts: list[int]) -> Iterator[int]:
    for number, document in enumerate(documents):
        yield int(batch.objectives[number : number + 1] != (document.objective,))


def _label_positions(batch: PackedBatch, documents: Sequence[Document], starts: list[int]) -> Iterator[int]:
    found: list[set[tuple[str, int]]] = [set() for _ in documents]
    for name, positions in batch.label_positions.items():
        for position in positions.tolist():
            found[bisect_right(starts, position) - 1].add((name, position))
    for document, start, there in zip(documents, starts, found, strict=False):
        own = {(document.objective, start + int(p)) for p in np.flatnonzero(document.labels != IGNORE_INDEX)}
        yield len(own ^ there)


def _pooled(batch: PackedBatch, documents: Sequence[Document], starts: list[int]) -> Iterator[int]:
    """Embeddings of a view stand in the order of its documents, each with its positions and its sample."""
    left = {
        name: list(zip(_pieces(places.tolist(), batch.pool_sizes[name]), batch.pairs.get(name, ()), strict=False))
        for name, places in batch.pooled.items()
    }
    for document, start in zip(documents, starts, strict=False):
        if document.pooled is None or document.view is None:
            yield 0
            continue
        there = left.get(f"{document.objective}/{document.view}")
        first = start + document.pooled
        own = (list(range(first, first + document.pool_size)), document.pair)
        yield int(not there or there.pop(0) != own)


def _pieces(places: list[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Cuts a list, which may be shorter than it should be."""
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        yield places[end - size : end]


def _media(batch: PackedBatch, documents: Sequence[Document], starts: list[int]) -> Iterator[int]:
    """Embeddings whose slot is not filled by the right row of an item that is, pixel by pixel or frame by frame, the document's."""
    row_of = {
        kind: dict(zip(media.slots.tolist(), media.rows.tolist(), strict=True)) for kind, media in batch.media.items()
    }
    first_rows = {kind: [0, *accumulate(media.num_tokens)] for kind, media in batch.media.items()}
    first_values = {kind: [0, *accumulate(media.lengths)] for kind, media in batch.media.items()}
    for document, start in zip(documents, starts, strict=False):
        wrong = 0
        for offset, item in document.media:
            rows = [row_of.get(item.kind, {}).get(start + offset + place, -1) for place in range(item.num_tokens)]
            number = bisect_right(first_rows.get(item.kind, []), rows[0]) - 1
            if rows != list(range(rows[0], rows[0] + item.num_tokens)) or rows[0] != first_rows[item.kind][number]:
                wrong += item.num_tokens
                continue
            first, last = first_values[item.kind][number : number + 2]
            values = batch.media[item.kind].values[first:last].reshape(-1)
            wrong += item.num_tokens * int(not torch.equal(values, item.values.reshape(-1)))
        yield wrong
