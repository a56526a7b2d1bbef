"""Shares with their intervals, and the lengths of context that shares say are in use."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
