"""Which documents to perturb together, so that few passes see every ordered pair of them.

A pass perturbs some units (documents, or the items of an encoder) and looks at the others: it tests every pair (perturbed, not perturbed)
at once. Testing all pairs therefore needs far fewer passes than units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, count, islice
from math import comb


def every_pair(num_units: int) -> list[tuple[int, ...]]:
    """Sets of units such that for every ordered pair (i, j) some set holds i and not j.

    Each unit gets its own set of m // 2 of m passes. No such set contains another, so unit i has a pass that unit j has not; and no m
    could be smaller (Sperner 1928). 463 documents take 12 passes.
    """
    num_passes = next(m for m in count() if comb(m, m // 2) >= num_units)
    if num_units < 2:
        return [(unit,) for unit in range(num_units)]
    passes: list[list[int]] = [[] for _ in range(num_passes)]
    for unit, members in enumerate(islice(combinations(range(num_passes), num_passes // 2), num_units)):
        for number in members:
            passes[number].append(unit)
    return [tuple(units) for units in passes if units]


def neighbours(num_units: int) -> list[tuple[int, ...]]:
    """Every other unit, then the rest: two passes that see each unit beside its neighbours, in both directions."""
    return [units for first in (0, 1) if (units := tuple(range(first, num_units, 2)))]


def stretches(num_units: int) -> list[tuple[int, ...]]:
    """The first and the third quarter, then the rest: two passes that leave neighbours together, as the views of a sample are."""
    quarter = -(-num_units // 4)
    halves = [tuple(unit for unit in range(num_units) if unit // quarter % 2 == side) for side in (0, 1)]
    return [units for units in halves if units]


def narrow(candidates: Sequence[int], is_guilty: Callable[[Sequence[int]], bool]) -> int:
    """One of the candidates that suffices to make `is_guilty` true, given that all of them together do; earlier ones are preferred.

    Asks the first, then the next two, four and so on: the first candidates are the likely ones.
    """
    size = 1
    while size < len(candidates):
        some = candidates[:size]
        if is_guilty(some):
            return narrow(some, is_guilty) if size > 1 else some[0]
        candidates, size = candidates[size:], 2 * size
    return narrow(candidates, is_guilty) if len(candidates) > 1 else candidates[0]
