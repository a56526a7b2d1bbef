"""Classifiers on frozen features, by scikit-learn: logistic regression and nearest neighbours.

Shapes: n samples to fit on, m to classify, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmctx.eval.intervals import wilson_interval

FOLDS = 5
"""One of so many parts of the samples to fit on is held back to choose the penalty."""


def classify(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    wanted: np.ndarray,
    neighbours: Sequence[int],
    inverse_penalties: Sequence[float],
    order: np.ndarray,
) -> dict[str, Any]:
    """Accuracies `{"linear": {"accuracy", "low", "high", "C"}, "1-NN": {"accuracy", "low", "high"}, ...}` with Wilson's 95% interval.

    Args:
        train: (n, F).
        labels: (n,) int64 classes.
        test: (m, F).
        wanted: (m,) int64 classes; one that `labels` does not hold is never right.
        neighbours: k of k-NN; those above n take all n.
        inverse_penalties: C of the linear probe to choose from.
        order: (n,) numbers that say at random, but always alike, who is held back.
    """
    linear = linear_probe(train, labels, inverse_penalties, held_back(labels, order))
    results = {"linear": _score(linear.predict(test), wanted) | {"C": float(linear["logisticregression"].C)}}
    for k in neighbours:
        results[f"{k}-NN"] = _score(nearest(train, labels, k).predict(test), wanted)
    return results


def held_back(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(n,) bool: of each class every fifth in the order of `order` (n,); of classes with fewer than five samples none."""
    back = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        back[mine[np.argsort(order[mine], kind="stable")][FOLDS - 1 :: FOLDS]] = True
    return back


def linear_probe(features: np.ndarray, labels: np.ndarray, inverse_penalties: Sequence[float], back: np.ndarray) -> Any:
    """Multinomial logistic regression with an L2 penalty on features made to have mean 0 and variance 1, fitted on all n samples.

    C is the one that, fitted on the others, is right about most of those held back (`back`, (n,) bool), of equals the smallest; the
    middle one where none is held back.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    grid = sorted(inverse_penalties)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=grid[len(grid) // 2], max_iter=2000))
    if len(grid) == 1 or not back.any():
        return probe.fit(features, labels)
    search = GridSearchCV(probe, {"logisticregression__C": grid}, cv=PredefinedSplit(np.where(back, 0, -1)))
    return search.fit(features, labels).best_estimator_


def nearest(features: np.ndarray, labels: np.ndarray, k: int) -> Any:
    """The commonest class among the k samples of highest cosine, of equals the first (as in Wu et al. 2018, without their weights)."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(k, len(features)), metric="cosine", algorithm="brute").fit(features, labels)


def _score(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    right = int((found == wanted).sum())
    low, high = wilson_interval(right, len(wanted))
    return {"accuracy": right / len(wanted), "low": low, "high": high}
