"""The documents of a bin with the samples that they come from: for suites that ask more than a packed batch tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmctx.datasets.fetch import PackedDataset
from mmctx.datasets.planning.plan import Bin
from mmctx.errors import SampleError
from mmctx.pack import Document


class Found(NamedTuple):
    """A document and where it comes from.

    Attributes:
        document: of some objective.
        source: number of its source.
        sample: number of its sample in that source.
    """

    document: Document
    source: int
    sample: int


def documents_of(dataset: PackedDataset, bin: Bin) -> Iterator[Found]:
    """Every document of a bin, in the order in which `dataset[bin]` packs them; samples that cannot be used are noted in `dataset`."""
    for number, sample_id, epoch, part in bin.samples:
        try:
            documents = dataset.documents(number, sample_id, epoch, part)
        except SampleError as error:
            dataset.note(number, sample_id, error)
            continue
        for document in documents:
            yield Found(document, number, sample_id)


def grouped(documents: Sequence[Document], tokens: int) -> list[list[Document]]:
    """Documents in turn, as many to a group as fit into `tokens`, but one at least."""
    groups: list[list[Document]] = []
    room = 0
    for document in documents:
        length = len(document.input_ids)
        if not groups or length > room:
            groups.append([])
            room = tokens
        groups[-1].append(document)
        room -= length
    return groups
