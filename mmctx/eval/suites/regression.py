"""Suite `regression`: do predicted numbers go with the right ones, and are they nearer to them than the mean is?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmctx.eval.context import EvalContext, each
from mmctx.eval.intervals import mean_of_documents
from mmctx.eval.packages import require
from mmctx.pack import PackedBatch

_FEWEST = 4
"""Documents: the interval of a correlation needs them."""


def evaluate_regression(context: EvalContext) -> dict[str, Any]:
    """`{OBJECTIVE: results}` of each `regression` objective that has four held-out documents; see `score_numbers`."""

    def answer(batch: PackedBatch, objective: str) -> list[tuple[float, float]]:
        if objective not in batch.label_positions:
            return []
        half: Any = context.model.objectives[objective]
        scores = half.scores(context.model.encode(batch), batch)[:, 0].double()
        pairs = torch.stack([half.values(half.targets(batch), torch.float64), scores], dim=1)
        return (pairs * half.scale + half.offset).tolist()

    results = {}
    for name in context.names("regression"):
        work = lambda batch, name=name: answer(batch, name)  # noqa: E731
        found = list(each(context.map_batches("regression", work, name)))
        if len(found) >= _FEWEST:
            truth, predicted = zip(*found, strict=True)
            results[name] = score_numbers(truth, predicted)
    return results


def score_numbers(truth: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """How near predictions are.

    Returns:
        `pearson` and `spearman`, each `{"value", "low", "high"}` with the 95% interval of Fisher's z (for ranks widened as by Bonett &
        Wright 2000), 0 where all predictions are equal; `mse` and `mse_of_mean`, of predicting the mean of these very labels, each
        `{"mean", "low", "high", "n"}`; `r2`, 1 - mse / mse_of_mean; `n`.
    """
    require("scipy")
    from scipy.stats import pearsonr, spearmanr

    right, guessed = np.array(truth), np.array(predicted)
    squares, spread = (right - guessed) ** 2, (right - right.mean()) ** 2
    return {
        "pearson": _correlation(pearsonr, right, guessed, lambda r: 1.0),
        "spearman": _correlation(spearmanr, right, guessed, lambda r: 1 + r * r / 2),
        "mse": mean_of_documents([(float(square), 1) for square in squares]),
        "mse_of_mean": mean_of_documents([(float(square), 1) for square in spread]),
        "r2": float(1 - squares.mean() / spread.mean()) if spread.any() else None,
        "n": len(right),
    }


def _correlation(
    measure: Callable[..., Any], right: np.ndarray, guessed: np.ndarray, variance: Callable[[float], float]
) -> dict[str, float]:
    flat = min(np.ptp(right), np.ptp(guessed)) < 1e-12
    value = 0.0 if flat else float(measure(right, guessed)[0])
    middle = math.atanh(max(min(value, 1 - 1e-12), 1e-12 - 1))
    half = 1.959964 * math.sqrt(variance(value) / (len(right) - 3))
    return {"value": value, "low": math.tanh(middle - half), "high": math.tanh(middle + half)}


def regression_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """Both correlations and the error beside that of the mean."""
    found = {}
    for name, scores in results.items():
        found |= {f"{name}/{kind}": scores[kind]["value"] for kind in ("pearson", "spearman")}
        found |= {f"{name}/{kind}": scores[kind]["mean"] for kind in ("mse", "mse_of_mean")}
    return found
