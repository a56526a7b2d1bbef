"""Held-out documents one by one: where they come from, parts of them, and how many fit into a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from mmctx.datasets.fetch import PackedDataset
from mmctx.datasets.planning.plan import Bin
from mmctx.errors import SampleError
from mmctx.pack import IGNORE_INDEX, Document

Place = tuple[int, int, int, int]
"""(source number, sample id, epoch, part), as in `Bin.samples`."""
Item = TypeVar("Item")


class Found(NamedTuple):
    """A document and where it comes from."""

    place: Place
    document: Document


def documents_of(dataset: PackedDataset, bin: Bin) -> Iterator[Found]:
    """Every document of a bin, in the order in which `dataset[bin]` packs them; samples that cannot be used are noted in `dataset`."""
    for place in bin.samples:
        try:
            documents = dataset.documents(*place)
        except SampleError as error:
            dataset.note(place[0], place[1], error)
            continue
        for document in documents:
            yield Found(place, document)


def excerpt(document: Document, spans: Iterable[tuple[int, int]]) -> Document:
    """The document made of some of its tokens, media that lie in them included; labels are left out."""
    ids, media, length = [], [], 0
    for start, end in spans:
        ids.append(document.input_ids[start:end])
        media += [(length + at - start, item) for at, item in document.media if start <= at < end]
        length += end - start
    input_ids = np.concatenate(ids)
    return replace(document, input_ids=input_ids, labels=np.full_like(input_ids, IGNORE_INDEX), media=tuple(media))


def grouped(items: Sequence[Item], lengths: Sequence[int], tokens: int) -> list[list[Item]]:
    """Items in turn, as many to a group as fit into `tokens` by their `lengths`, but one at least."""
    groups: list[list[Item]] = []
    room = 0
    for item, length in zip(items, lengths, strict=True):
        if not groups or length > room:
            groups.append([])
            room = tokens
        groups[-1].append(item)
        room -= length
    return groups


def num_tokens(documents: Sequence[Document]) -> list[int]:
    """Of each document."""
    return [len(document.input_ids) for document in documents]
