"""Texts, and neighbouring spans of them, whose lengths the index knows: from the size of a text alone.

Shapes: n samples.
"""

from __future__ import annotations

import numpy as np

from mmctx.objectives.base import text_column, text_of
from mmctx.pack import MediaItem
from mmctx.sample import Sample, SampleSizes


def text_lengths(sizes: SampleSizes, number: int) -> np.ndarray:
    """(n,) tokens of text `number`, or of all segments of a document without media, such as a part of a long text; -1 or 0 for none."""
    alone = sizes.image_tokens + sizes.audio_tokens == 0
    whole = np.where(alone, sizes.text_tokens[:, 0], -1)
    return np.where(sizes.interleaved, whole, text_column(sizes, number))


def whole_text(sample: Sample, number: int) -> np.ndarray | None:
    """The text that `text_lengths` counts, None where there is none."""
    if sample.segments is None:
        return text_of(sample, number)
    texts = [part for part in sample.segments if not isinstance(part, MediaItem)]
    return np.concatenate(texts) if texts and len(texts) == len(sample.segments) else None


def neighbour_lengths(length, longest: int | None):
    """Tokens of two neighbouring spans of a text, integers or arrays of them: its halves, or so many tokens of them at most.

    None of both where a text has fewer than two tokens.
    """
    length = np.where(np.asarray(length) < 2, 0, length)
    first = length // 2
    cap = np.iinfo(np.int64).max if longest is None else longest
    return np.minimum(first, cap), np.minimum(length - first, cap)


def draw_neighbours(
    text: np.ndarray, longest: int | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """Two spans of a text, one directly behind the other, of the lengths above; where they leave some of it out, from a random place."""
    first, second = (int(length) for length in neighbour_lengths(len(text), longest))
    if not first:
        return None
    start = int(rng.integers(0, len(text) - first - second + 1))
    return text[start : start + first], text[start + first : start + first + second]
