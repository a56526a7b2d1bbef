"""What becomes of a document that is longer than the context: dropped, truncated, split or streamed, by declared policy. Media are never
cut.

The plan cuts lengths that the index knows, the loader cuts the decoded sample: both through `cut`, so that they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from mmctx.datasets.planning.order import derive_key
from mmctx.errors import SampleError
from mmctx.pack import Document, MediaItem
from mmctx.sample import Sample, make_uid, source_numbers

LongDocuments = Literal["drop", "truncate", "split", "stream"]
"""`drop`: the sample is left out as `over_long`. `truncate`: its text is cut off where the context ends. `split`: an interleaved
document or a text without media becomes several documents, cut between segments where possible; other samples are truncated. `stream`:
it stays one document, whose pieces are read in successive steps; what layers look back to is carried from one to the next."""


class Piece(NamedTuple):
    """Tokens `start` to `stop` of one segment."""

    segment: int
    start: int
    stop: int


def cut(lengths: Sequence[int], is_media: Sequence[bool], room: int) -> list[list[Piece]]:
    """Cuts a document into parts of at most `room` tokens, between segments where it can.

    A segment that does not fit into what is left of a part opens the next one. Text that is longer than a whole part fills up what is left
    and goes on in the next. Media of more than `room` tokens have no place: the caller rules them out before.

    Returns:
        the pieces of each part in reading order; empty segments are in none.
    """
    parts: list[list[Piece]] = [[]]
    left = room
    for number, (length, media) in enumerate(zip(lengths, is_media, strict=True)):
        start = 0
        while start < length:
            if length - start <= left:
                stop = length
            elif left < room and (media or length <= room):
                stop = start  # it fits into a part of its own
            else:
                stop = length if media else start + left
            if stop > start:
                parts[-1].append(Piece(number, start, stop))
                left = max(left - (stop - start), 0)  # less than nothing is left beside media that have no place
            if stop < length:
                parts.append([])
                left = room
            start = stop
    return [part for part in parts if part]


def cut_stream(length: int, media: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Where the pieces of a streamed document end: each has `room` tokens, or less where media would be cut.

    Args:
        length: tokens of the document.
        media: (offset, tokens) of each item in running order, none of more than `room` tokens.
        room: tokens of a piece.
    """
    stops, number = [0], 0
    while stops[-1] < length:
        stop = min(stops[-1] + room, length)
        while number < len(media) and sum(media[number]) <= stop:
            number += 1
        if number < len(media) and media[number][0] < stop:
            stop = media[number][0]
        stops.append(stop)
    return stops[1:]


def piece_of(document: Document, number: int, room: int) -> Document:
    """One piece of a streamed document.

    Raises:
        SampleError: it has not so many pieces.
    """
    spans = [(offset, item.num_tokens) for offset, item in document.media]
    stops = [0, *cut_stream(len(document.input_ids), spans, room)]
    if number + 1 >= len(stops):
        raise SampleError("over_long", f"the index promises piece {number}, the document makes {len(stops) - 1}")
    start, stop = stops[number], stops[number + 1]
    return replace(
        document,
        input_ids=document.input_ids[start:stop],
        labels=document.labels[start:stop],
        media=tuple((offset - start, item) for offset, item in document.media if start <= offset < stop),
        start=start,
    )


def split_sample(sample: Sample, policy: LongDocuments, room: int) -> list[Sample]:
    """The parts of a decoded sample some document of which is longer than the context; their documents all fit into it.

    A plain text becomes one segment where it is split. `drop` leaves everything as it is: the plan has ruled long samples out.

    Args:
        sample: the whole.
        policy: what becomes of it.
        room: tokens of a part, all objectives' `DataHalf.room` kept.
    """
    segments = sample.segments
    if policy == "drop":
        return [sample]
    if segments is None and (policy == "truncate" or not is_plain_text(sample)):
        return [_truncate_texts(sample, room)]
    segments = segments if segments is not None else tuple(text for text in sample.texts[:1] if text is not None)
    lengths = [part.num_tokens if isinstance(part, MediaItem) else len(part) for part in segments]
    if sum(lengths) <= room:
        return [sample]
    parts = cut(lengths, [isinstance(part, MediaItem) for part in segments], room)
    if policy == "truncate":
        parts = parts[:1]
    return [_part(sample, segments, number, part) for number, part in enumerate(parts)]


def is_plain_text(sample: Sample) -> bool:
    """A single text without media."""
    return sample.image is None and sample.audio is None and len(sample.texts) == 1


def _truncate_texts(sample: Sample, room: int) -> Sample:
    """Every text short enough to stand beside the sample's picture or its clip."""
    media = max((item.num_tokens for item in (sample.image, sample.audio) if item is not None), default=0)
    texts = tuple(None if text is None else text[: max(room - media, 0)] for text in sample.texts)
    return replace(sample, texts=texts)


def _part(sample: Sample, segments: Sequence[np.ndarray | MediaItem], number: int, pieces: Sequence[Piece]) -> Sample:
    learned = None if sample.learned is None else tuple(sample.learned[piece.segment] for piece in pieces)
    uid = sample.uid  # each part is a sample by itself
    if number:
        (source_number,) = source_numbers(np.array([uid])).tolist()
        uid = make_uid(source_number, derive_key(uid, "part", number) >> 16)
    return replace(
        sample, uid=uid, texts=(), segments=tuple(_piece(segments, piece) for piece in pieces), learned=learned
    )


def _piece(segments: Sequence[np.ndarray | MediaItem], piece: Piece) -> np.ndarray | MediaItem:
    segment = segments[piece.segment]
    return segment if isinstance(segment, MediaItem) else segment[piece.start : piece.stop]
