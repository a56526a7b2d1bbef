"""What a run will read and compute, before it runs: what `mmctx plan` prints."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from mmctx.datasets.planning.plan import Bin, Plan, share_out

TRIAL_STEPS = 256
RANKS = (2, 4, 8)


def forecast(plan: Plan, steps: int) -> dict[str, Any]:
    """Steps, tokens, samples, repeats, fill and evenness of `steps` steps of a plan, from its own bins of the first steps.

    Samples drawn and how often they repeat are exact up to one window; tokens, fill and FLOPs are measured on the first windows and
    scaled up.
    """
    config = plan.config
    trial = min(steps, max(TRIAL_STEPS, plan.window_steps))
    bins = [plan.step(plan.start.step + number) for number in range(trial)]
    flat = [bin for step in bins for bin in step]
    tokens, costs = np.array([bin.tokens for bin in flat]), np.array([bin.cost for bin in flat])
    return {
        "steps": steps,
        "tokens": round(int(tokens.sum()) * steps / trial),
        "flops": float(costs.sum(dtype=float) * steps / trial),
        "sources": {name: _source(plan, number, steps) for number, name in enumerate(plan.names)},
        "window": {"steps": plan.window_steps, "samples": plan.samples_per_window},
        "samples_per_step": plan.samples_per_step,
        "bins_per_step": {"usual": config.bins_per_step, "mean": len(flat) / trial},
        "tokens_per_bin": {"mean": float(tokens.mean()), "max": int(tokens.max()), "limit": config.bin_tokens},
        "fill": float(tokens.mean() / config.bin_tokens),
        "imbalance": {
            f"{ranks} ranks": _imbalance(bins, ranks) for ranks in RANKS if config.bins_per_step % ranks == 0
        },
    }


def largest_bin(plan: Plan, steps: int) -> tuple[int, int]:
    """(step, number) of the bin with the most tokens among those of the first steps: where memory peaks."""
    trial = range(min(steps, max(TRIAL_STEPS, plan.window_steps)))
    sizes = {(s, n): bin.tokens for s in trial for n, bin in enumerate(plan.step(plan.start.step + s))}
    step, number = max(sizes, key=sizes.__getitem__)
    return plan.start.step + step, number


def _source(plan: Plan, number: int, steps: int) -> dict[str, Any]:
    """How often a source is read: unique samples, repeats, and what is left out."""
    name, survey = plan.names[number], plan.surveys[number]
    size = survey.num_samples
    apart = plan.is_weighted or name in plan.config.streamed
    packed = sum(t.num_samples for n, t in zip(plan.names, plan.tables, strict=True) if n not in plan.config.streamed)
    order, share = (name, 1) if apart else ("", Fraction(size, packed))
    before = int(plan.start.drawn.get(order, 0) * share)  # by earlier segments
    after = int(plan.draws(steps)[order] * share)
    drawn, unique = after - before, min(after, size) - min(before, size)
    usable = 1 - sum(survey.reasons.values()) / survey.num_seen
    return {
        "samples": size,
        "drawn": drawn,
        "epochs": drawn / size,
        "unique": unique,
        "repeats": drawn - unique,
        "usable": usable,
        "left_out": dict(survey.reasons)
        if survey.is_complete
        else {k: f"{v} of {survey.num_seen}" for k, v in survey.reasons.items()},
        "tokens": round(float(survey.mean("tokens")) * drawn),
    }


def _imbalance(steps: list[list[Bin]], ranks: int) -> float:
    """The worst step's dearest rank over its mean rank: how much longer that step takes than it should."""
    ratios = []
    for bins in steps:
        costs = np.array([sum(bin.cost for _, bin in share_out(bins, rank, ranks)) for rank in range(ranks)], float)
        ratios.append(costs.max() / costs.mean() if costs.any() else 1.0)
    return float(max(ratios))
