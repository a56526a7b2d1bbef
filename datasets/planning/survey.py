"""What a source is like on average, without reading all of its index: how many samples fill a window follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mmctx.datasets.planning.table import LIMITED, Table
from mmctx.datasets.shards.contents import REASONS

IN_FULL = 1 << 17
"""Sources of up to so many samples are looked at in full."""
CLUSTERS, CLUSTER_SIZE = 64, 256
"""Of larger ones, so many stretches of so many neighbours, evenly spaced: few shards are opened."""
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Survey:
    """Sums over the samples looked at; integers, so that every machine finds the same.

    Attributes:
        num_samples: samples of the source.
        num_seen: samples looked at.
        reasons: how many of them cannot be used, by reason.
        sums: of each quantity in `LIMITED`.
        square: sum of the squares of their tokens.
        units: (u, 4) sizes of units seen, at most `IN_FULL` of them.
        costs: (u,) FLOPs of these.
    """

    num_samples: int
    num_seen: int
    reasons: dict[str, int]
    sums: tuple[int, ...]
    square: int
    units: np.ndarray
    costs: np.ndarray

    @property
    def is_complete(self) -> bool:
        """Every sample was looked at."""
        return self.num_seen == self.num_samples

    def mean(self, quantity: str) -> Fraction:
        """Of a sample, those that cannot be used counted as nothing."""
        return Fraction(self.sums[LIMITED.index(quantity)], self.num_seen)

    @property
    def variance(self) -> float:
        """Of a sample's tokens."""
        return max(0.0, float(Fraction(self.square, self.num_seen) - self.mean("tokens") ** 2))


def survey(table: Table) -> Survey:
    """Looks at a source."""
    reasons: Counter[str] = Counter()
    sums, square, seen = np.zeros(len(LIMITED), np.int64), 0, 0
    sizes, costs = [], []
    for ids in _stretches(table.num_samples):
        units = table.units(ids)
        seen += len(ids)
        reasons.update(REASONS[code] for code in units.reasons[units.reasons > 0].tolist())
        sums += units.sizes.sum(axis=0)
        tokens = np.zeros(len(ids), np.int64)
        np.add.at(tokens, units.owner, units.sizes[:, 0])
        square += int((tokens**2).sum())
        sizes.append(units.sizes)
        costs.append(units.costs)
    return Survey(
        num_samples=table.num_samples,
        num_seen=seen,
        reasons=dict(reasons),
        sums=tuple(sums.tolist()),
        square=square,
        units=np.concatenate(sizes)[:IN_FULL],
        costs=np.concatenate(costs)[:IN_FULL],
    )


def _stretches(num_samples: int) -> Iterator[np.ndarray]:
    if num_samples <= IN_FULL:
        for start in range(0, num_samples, _CHUNK):
            yield np.arange(start, min(start + _CHUNK, num_samples))
        return
    for number in range(CLUSTERS):
        start = number * (num_samples - CLUSTER_SIZE) // (CLUSTERS - 1)
        yield np.arange(start, start + CLUSTER_SIZE)
