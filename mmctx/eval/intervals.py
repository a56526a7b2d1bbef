"""Shares and means with their intervals, and the lengths of context that shares say are in use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PASSES = 0.856
"""RULER's threshold: a length passes if this share is answered, what Llama 2 7B reaches at 4,096 tokens (Hsieh et al. 2024)."""


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which stays inside 0 to 1 for few and for extreme counts.

    Where each of n documents gives a share of its own, `successes` is the sum of these: as their variance is at most that of n answers
    that are right or wrong, the interval is then too wide rather than too narrow.
    """
    share, square = successes / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_of_documents(parts: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The mean over tokens from (sum, count) of each document: `mean`, its 95% interval `low` to `high` and `n` tokens.

    It takes documents, not tokens, as independent: the linearised variance of a ratio (Cochran 1977, section 2.11). It is None for a
    single document.
    """
    sums, counts = np.array([s for s, _ in parts]), np.array([c for _, c in parts])
    mean, documents = sums.sum() / counts.sum(), len(parts)
    if documents < 2:
        return {"mean": float(mean), "low": None, "high": None, "n": int(counts.sum())}
    spread = np.square(sums - mean * counts).sum() * documents / (documents - 1)
    half = 1.959964 * math.sqrt(spread) / counts.sum()
    return {"mean": float(mean), "low": float(mean - half), "high": float(mean + half), "n": int(counts.sum())}


def longest_passing(shares: Mapping[int, float]) -> int:
    """RULER's effective length: the longest that reaches `PASSES`, whatever shorter ones do; 0 if none does."""
    return max((length for length, share in shares.items() if share >= PASSES), default=0)


def longest_unbroken(shares: Mapping[int, float], above_chance: Mapping[int, bool]) -> int:
    """The strict effective length: all lengths up to it reach `PASSES` and are above chance; 0 if the shortest does not."""
    longest = 0
    for length in sorted(shares):
        if shares[length] < PASSES or not above_chance[length]:
            break
        longest = length
    return longest
