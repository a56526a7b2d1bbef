"""Suite `classification`: how often is the class of a held-out document named, and is that more than the commonest class gives?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmctx.eval.context import EvalContext, each
from mmctx.eval.intervals import wilson_interval
from mmctx.pack import PackedBatch


def evaluate_classification(context: EvalContext) -> dict[str, Any]:
    """`{OBJECTIVE: results}` of each `classification` objective that has held-out documents; see `score_classes`."""

    def answer(batch: PackedBatch, objective: str) -> list[tuple[int, int]]:
        if objective not in batch.label_positions:
            return []
        half: Any = context.model.objectives[objective]
        chosen = half.scores(context.model.encode(batch), batch).argmax(dim=-1)
        return list(zip(half.targets(batch).tolist(), chosen.tolist(), strict=True))

    results = {}
    for name in context.names("classification"):
        work = lambda batch, name=name: answer(batch, name)  # noqa: E731
        found = list(each(context.map_batches("classification", work, name)))
        if found:
            truth, chosen = zip(*found, strict=True)
            results[name] = score_classes(truth, chosen, context.objectives[name].names)  # type: ignore[union-attr]
    return results


def score_classes(truth: Sequence[int], chosen: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """How well classes were told.

    Args:
        truth, chosen: numbers of the right classes and of those named.
        names: of all classes.

    Returns:
        `accuracy` with its Wilson interval `low` to `high`; `macro_f1`, the mean of the F1 scores of classes that occur on either side;
        `majority`, what naming the commonest class of these very documents would give, with `low`, `high` and `macro_f1`; `per_class` with
        `precision`, `recall`, `f1` and `n` by name; `confusion`, counts by right class (rows) and named class (columns); `n`.
    """
    size, n = len(names), len(truth)
    confusion = np.zeros((size, size), np.int64)
    np.add.at(confusion, (np.array(truth), np.array(chosen)), 1)
    most = int(confusion.sum(axis=1).argmax())
    blind = np.zeros_like(confusion)
    blind[:, most] = confusion.sum(axis=1)
    return {
        **_accuracy(confusion),
        "majority": {**_accuracy(blind), "class": names[most]},
        "per_class": {name: _of_class(confusion, number) for number, name in enumerate(names)},
        "confusion": confusion.tolist(),
        "classes": list(names),
        "n": n,
    }


def _accuracy(confusion: np.ndarray) -> dict[str, float]:
    right, n = int(np.trace(confusion)), int(confusion.sum())
    low, high = wilson_interval(right, n)
    occurring = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    scores = [_of_class(confusion, int(number))["f1"] for number in occurring]
    return {"accuracy": right / n, "low": low, "high": high, "macro_f1": float(np.mean(scores))}


def _of_class(confusion: np.ndarray, number: int) -> dict[str, float]:
    right, named, there = (
        int(c) for c in (confusion[number, number], confusion[:, number].sum(), confusion[number].sum())
    )
    return {
        "precision": right / named if named else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (named + there) if named + there else 0.0,
        "n": there,
    }


def classification_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy, macro-F1 and the majority's accuracy."""
    found = {}
    for name, scores in results.items():
        found |= {f"{name}/accuracy": scores["accuracy"], f"{name}/macro_f1": scores["macro_f1"]}
        found[f"{name}/majority"] = scores["majority"]["accuracy"]
    return found
