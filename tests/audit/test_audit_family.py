"""Sets of units that test every pair, and finding one culprit among many."""

from __future__ import annotations

from itertools import permutations

import pytest

from mmctx.audit.family import every_pair, narrow, neighbours, stretches


@pytest.mark.parametrize("num_units", [1, 2, 3, 4, 7, 20, 21, 70])
def test_some_pass_perturbs_each_unit_and_looks_at_each_other(num_units: int) -> None:
    passes = [set(units) for units in every_pair(num_units)]
    for i, j in permutations(range(num_units), 2):
        assert any(i in units and j not in units for units in passes)
    assert set().union(*passes) == set(range(num_units))


def test_passes_are_few() -> None:
    assert [len(every_pair(n)) for n in (2, 3, 6, 20, 70, 463)] == [2, 3, 4, 6, 8, 12]


@pytest.mark.parametrize("num_units", [1, 2, 5, 8])
def test_neighbours_are_seen_in_both_directions(num_units: int) -> None:
    passes = [set(units) for units in neighbours(num_units)]
    for i in range(num_units - 1):
        for a, b in ((i, i + 1), (i + 1, i)):
            assert any(a in units and b not in units for units in passes)
    assert set().union(*passes) == set(range(num_units))


@pytest.mark.parametrize("num_units", [1, 2, 5, 8, 22])
def test_stretches_are_two_halves(num_units: int) -> None:
    assert sorted(unit for units in stretches(num_units) for unit in units) == list(range(num_units))
    assert len(stretches(num_units)) == min(num_units, 2)


def test_narrow_finds_a_culprit_and_prefers_earlier_ones() -> None:
    for culprits in ({5}, {0}, {9}, {3, 7}):
        assert narrow(list(range(10)), lambda some, culprits=culprits: bool(culprits & set(some))) == min(culprits)
