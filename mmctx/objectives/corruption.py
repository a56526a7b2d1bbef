"""Hiding, dropping and shuffling tokens in exact numbers: what objectives and augmentation make harder to read.

Shapes: n tokens, k spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Places that are chosen together.

    Attributes:
        places: (m,) ascending numbers of tokens.
        owner: (m,) number of the span that each belongs to.
        count: k.
    """

    places: np.ndarray
    owner: np.ndarray
    count: int


def exact_share(length, share: float):
    """floor(share * length) of integers or arrays of them, share rounded to a thousandth: no machine rounds it otherwise."""
    return length * round(1000 * share) // 1000


def choose_spans(length: int, budget: int, mean: float, rng: np.random.Generator) -> Spans:
    """`budget` of n places in spans of geometric lengths, as in SpanBERT (Joshi et al. 2020); the last span is cut to keep the budget.

    Every arrangement of the spans is as likely, and a token stays between two of them where there are enough.
    """
    if not budget:
        return Spans(np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
    lengths = rng.geometric(1 / mean, size=budget)  # at least one token each: surely enough spans
    ends = np.cumsum(lengths)
    count = int(np.searchsorted(ends, budget)) + 1
    lengths = lengths[:count]
    lengths[-1] -= ends[count - 1] - budget
    gaps = length - budget + 1  # before, between and behind the tokens that are left alone
    before = np.sort(rng.choice(gaps, size=count, replace=count > gaps))
    owner = np.repeat(np.arange(count), lengths)
    return Spans(before[owner] + np.arange(budget), owner, count)


def choose(length: int, budget: int, rng: np.random.Generator) -> Spans:
    """`budget` of n places, each for itself."""
    places = np.sort(rng.choice(length, size=budget, replace=False))
    return Spans(places, np.arange(budget), budget)


def shuffle_pieces(tokens: np.ndarray, pieces: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) tokens cut at `pieces - 1` random places, the pieces in random order, as BART permutes sentences (Lewis et al. 2020)."""
    pieces = min(pieces, len(tokens))
    if pieces < 2:
        return tokens
    cuts = np.sort(rng.choice(len(tokens) - 1, size=pieces - 1, replace=False)) + 1
    parts = np.split(tokens, cuts)
    return np.concatenate([parts[number] for number in rng.permutation(pieces)])
