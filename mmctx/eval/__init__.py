"""Evaluation: suites that run on any checkpoint, and inside training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from mmctx.errors import ConfigError
from mmctx.eval.context import EvalContext, Ranks
from mmctx.eval.suites import SUITES, Suite, headlines


def evaluate(context: EvalContext, suites: Sequence[str]) -> dict[str, Any]:
    """Runs suites by name and returns `{suite: its results}`, and under `skipped` how many held-out samples could not be used.

    Names may be written with hyphens. With several ranks all of them call this, and all get the same results.

    Raises:
        ConfigError: a suite's name is unknown.
    """
    names = known_suites(suites)
    training = context.model.training
    context.model.eval()
    try:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=context.bf16):
            results = {name: SUITES[name].run(context) for name in names}
    finally:
        context.model.train(training)
    return {**results, "skipped": count_skips(context)}


def known_suites(names: Sequence[str]) -> list[str]:
    """The names as `SUITES` has them.

    Raises:
        ConfigError: one is unknown.
    """
    plain = [name.replace("-", "_") for name in names]
    if unknown := [name for name, key in zip(names, plain, strict=True) if key not in SUITES]:
        raise ConfigError(f"no evaluation suite named {unknown[0]!r}; there are {', '.join(SUITES)}")
    return plain


def count_skips(context: EvalContext) -> dict[str, int]:
    """Held-out samples that could not be used, by reason, each once; each rank knows those that it read."""
    found = {(skip.shard, skip.key): skip.reason for skip in context.data.left_out()}
    own = {place: skip.reason for place, skip in context.data.dataset.undecodable.items()}
    for other in context.ranks.gather(own):
        found |= other
    return dict(Counter(found.values()))


__all__ = ["SUITES", "EvalContext", "Ranks", "Suite", "count_skips", "evaluate", "headlines", "known_suites"]
