"""The drawing of one bin: documents side by side as long as their tokens, wrapped into rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mmctx.datasets.view.batch_media import Slots
from mmctx.pack import PackedBatch

_ROW_TOKENS, _MAX_ROWS = 1024, 12
_PITCH, _HEIGHT, _READ = 26, 18, 3


class Rect(NamedTuple):
    """A rectangle of the drawing; across, one unit is one token."""

    x: int
    y: float
    width: int
    height: float
    name: str


class Shape(NamedTuple):
    """One document.

    Attributes:
        hue: of its objective.
        title: what pointing at it says.
        target: anchor of its row, empty if it has none.
        rects: its body, one rectangle for each row of the drawing that it touches, then its media and what is read.
    """

    hue: str
    title: str
    target: str
    rects: list[Rect]


class Strip(NamedTuple):
    """The drawing of one bin.

    Attributes:
        width: tokens of a row.
        height: of all rows.
        empty: what the bin's tokens leave free.
        shapes: its documents.
    """

    width: int
    height: float
    empty: list[Rect]
    shapes: list[Shape]


def draw_strip(
    number: int,
    batch: PackedBatch,
    starts: Sequence[int],
    slots: Sequence[Sequence[Slots]],
    read: np.ndarray,
    bin_tokens: int,
    hues: Mapping[str, str],
    shown: int,
) -> Strip:
    """Draws a bin.

    Args:
        number: of the bin.
        batch: its packed batch of T tokens.
        starts: first position of each document, and T.
        slots: media of each document.
        read: (T,) whether a loss reads the hidden state.
        bin_tokens: the bin's size.
        hues: colour of each objective.
        shown: documents that have a row in the page.
    """
    total = max(batch.num_tokens, bin_tokens)
    width = min(total, max(_ROW_TOKENS, -(-total // _MAX_ROWS)))
    shapes = []
    for place, (first, end) in enumerate(pairwise(starts)):
        rects = list(_wrapped(first, end, width, 0, _HEIGHT, "doc"))
        for part in slots[place]:
            rects += _wrapped(part.first, part.first + part.count, width, 4, _HEIGHT - 8, f"media {part.kind}")
        edges = np.flatnonzero(np.diff(np.concatenate([[False], read[first:end], [False]])))
        for begin, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            rects += _wrapped(first + begin, first + stop, width, _HEIGHT + 1, _READ, "read")
        key = batch.keys[place] if batch.keys else ""
        title = f"{batch.objectives[place]} · {key} · {end - first} tokens"
        target = f"b{number}d{place}" if place < shown else ""
        shapes.append(Shape(hues[batch.objectives[place]], title, target, rects))
    empty = list(_wrapped(batch.num_tokens, total, width, 0, _HEIGHT, "empty"))
    return Strip(width, -(-total // width) * _PITCH, empty, shapes)


def _wrapped(first: int, end: int, width: int, top: float, height: float, name: str) -> Iterator[Rect]:
    while first < end:
        row, column = divmod(first, width)
        part = min(end - first, width - column)
        yield Rect(column, row * _PITCH + top, part, height, name)
        first += part
