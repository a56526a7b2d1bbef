"""From a sweep's ranges to optuna's distributions, and from chosen values back to the run's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmctx.errors import ConfigError
from mmctx.train.sweep.config import NumberRange, Range

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def distributions(ranges: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """By dotted key. Choices are kept as JSON: a database holds no lists."""
    return {key: _distribution(values) for key, values in ranges.items()}


def settings(ranges: Mapping[str, Range], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Chosen values as the config takes them."""
    return {key: v if isinstance(ranges[key], NumberRange) else json.loads(v) for key, v in chosen.items()}


def check_keys(ranges: Mapping[str, Range], tree: Any) -> None:
    """Every key must stand in the run's config.

    Raises:
        ConfigError: one does not.
    """
    for key in ranges:
        node, parts = tree, key.split(".")
        for depth, part in enumerate(parts):
            below: dict[Any, Any] = (
                dict(enumerate(node)) if isinstance(node, list) else node if isinstance(node, dict) else {}
            )
            index: Any = int(part) if isinstance(node, list) and part.isdigit() else part
            if index not in below:
                where = ".".join(parts[:depth]) or "the top level"
                there = ", ".join(map(str, below)) or "nothing"
                raise ConfigError(f"ranges: {key!r} is no key of the run's config: {where} holds {there}")
            node = below[index]


def _distribution(values: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, NumberRange):
        return CategoricalDistribution([json.dumps(value) for value in values])
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)
