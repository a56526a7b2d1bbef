"""How many steps are packed together, and how many samples they take: constants of a plan, so that step -> samples is in closed form.

A window holds a fixed number of samples, whose tokens vary. Limits are hard: where a window draws more than its bins hold, some of
its steps take twice as many bins. Fewer samples leave bins emptier, more samples make such steps more frequent; larger windows vary less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from statistics import NormalDist

import numpy as np

from mmctx.datasets.planning.packing import even_fit
from mmctx.datasets.planning.survey import Survey
from mmctx.datasets.planning.table import LIMITED

ENOUGH = 0.986
"""Expected fill at which windows need not grow any more."""
LARGEST = 4096
"""Bins of the largest window."""
ROUNDS = 10
"""A window reads a small set at most so many times over."""
_TRIAL = 2048
_QUANTILES = [NormalDist().inv_cdf((number + 0.5) / 64) for number in range(64)]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of steps that are packed together.

    Attributes:
        steps: how many.
        samples: how many samples they take.
    """

    steps: int
    samples: int


def fit_window(
    surveys: Sequence[Survey], shares: Sequence[Fraction], limits: Sequence[int], bins_per_step: int, steps: int | None
) -> Window:
    """The window of a plan.

    Args:
        surveys: of each source.
        shares: of the samples drawn from each source; they sum to 1.
        limits: of a bin, in the order of `LIMITED`.
        bins_per_step: bins of a step.
        steps: steps of the window; None to find out.
    """
    total = sum(survey.num_samples for survey in surveys)
    tightness = _tightness(surveys, shares, limits)
    sample_bins = _bins_per_sample(surveys, shares, limits) / tightness

    def fitted(steps: int) -> tuple[Window, float]:
        per_mille, fill = max(
            (
                (target, _expected_fill(target, steps, bins_per_step, surveys, shares, sample_bins))
                for target in range(800, 1001, 5)
            ),
            key=lambda pair: pair[1],
        )
        samples = int(Fraction(per_mille, 1000) * steps * bins_per_step / sample_bins) if sample_bins else 1
        return Window(steps, max(samples, 1)), fill * float(tightness)

    if steps is not None:
        return fitted(steps)[0]
    steps, (best, fill) = 1, fitted(1)
    while (fill < ENOUGH or steps < 8) and 2 * steps * bins_per_step <= LARGEST:
        steps *= 2
        larger, fill = fitted(steps)
        if larger.samples > ROUNDS * total:
            break
        best = larger
    return best


def _bins_per_sample(surveys: Sequence[Survey], shares: Sequence[Fraction], limits: Sequence[int]) -> Fraction:
    """Bins that a sample takes on average, by the quantity that is scarcest."""
    means = [
        sum((share * survey.mean(name) for survey, share in zip(surveys, shares, strict=True)), Fraction())
        for name in LIMITED
    ]
    return max(mean / limit for mean, limit in zip(means, limits, strict=True))


def _tightness(surveys: Sequence[Survey], shares: Sequence[Fraction], limits: Sequence[int]) -> Fraction:
    """Share of bins that sizes such as these can fill: near 1, but little more than a half for documents of 60% of a bin."""
    picked = []
    for survey, share in zip(surveys, shares, strict=True):
        count = ceil(_TRIAL * share * Fraction(len(survey.units), survey.num_seen))
        picked.append(
            (survey, np.arange(count) * max(1, len(survey.units) // max(count, 1)) % max(len(survey.units), 1))
        )
    sizes = np.concatenate(
        [survey.units[rows] for survey, rows in picked if len(survey.units)] or [np.zeros((0, 4), np.int64)]
    )
    costs = np.concatenate(
        [survey.costs[rows] for survey, rows in picked if len(survey.units)] or [np.zeros(0, np.int64)]
    )
    if not len(sizes):
        return Fraction(1)
    least = max(Fraction(int(total), limit) for total, limit in zip(sizes.sum(axis=0).tolist(), limits, strict=True))
    _, needed = even_fit(costs, sizes, limits, ceil(least), max(1, ceil(least / 200)))
    return least / needed


def _expected_fill(
    per_mille: int,
    steps: int,
    bins_per_step: int,
    surveys: Sequence[Survey],
    shares: Sequence[Fraction],
    sample_bins: Fraction,
) -> float:
    """Mean fill when windows are meant to fill their bins to `per_mille`, over the normal distribution of their tokens."""
    target = per_mille / 1000
    samples = target * steps * bins_per_step / float(sample_bins) if sample_bins else 1.0
    mean = sum(float(share * survey.mean("tokens")) for survey, share in zip(surveys, shares, strict=True))
    variance = sum(
        survey.variance * _effective(samples * float(share), survey.num_samples)
        for survey, share in zip(surveys, shares, strict=True)
    )
    spread = variance**0.5 / (samples * mean) if mean else 0.0
    extra = [max(0, ceil((target * (1 + spread * z) - 1) * steps)) / steps for z in _QUANTILES]
    return target / (1 + sum(extra) / len(extra))


def _effective(drawn: float, size: int) -> float:
    """Number of independent draws that vary as much as `drawn` in a row of repeated permutations of `size`, wherever they begin."""
    rest = drawn % size
    variances = []
    for number in range(8):
        first = min(rest, size * (number + 0.5) / 8)  # of the epoch where the stretch begins
        parts = (first, rest - first)
        variances.append(sum(part * (1 - part / size) for part in parts))
    return sum(variances) / len(variances)
