"""What one pass found, by document; shared by perturbations and gradients.

Shapes: T tokens, N documents, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHARED = -1
"""Stands for the documents of an objective whose loss compares them with each other."""


@dataclass(slots=True)
class Differences:
    """What changed that must not, or is not zero that must be.

    Attributes:
        comparisons: of each observed thing, how many documents or items were looked at.
        found: of each observed thing, the documents where it is wrong, and by how much.
    """

    comparisons: dict[str, int] = field(default_factory=dict)
    found: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, observed: str, comparisons: int, found: Mapping[int, float]) -> None:
        """Notes one more comparison."""
        self.comparisons[observed] = self.comparisons.get(observed, 0) + comparisons
        known = self.found.setdefault(observed, {})
        for document, size in found.items():
            known[document] = max(size, known.get(document, 0.0))

    def size(self, observed: str, document: int) -> float | None:
        """How wrong something is of a document; None where it is right."""
        return self.found.get(observed, {}).get(document)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """(R, C) twice -> (R,) bool: rows that differ in any bit that matters (zeros of both signs are equal, NaN equals nothing)."""
    return (before != after).any(dim=-1)


def largest(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference."""
    return float((before - after).abs().max())


def by_document(wrong: Tensor, sizes: Tensor, document_of: Tensor) -> dict[int, float]:
    """The documents of the true positions of `wrong` (T,), with the largest magnitude of `sizes` (T, C) there."""
    places = wrong.nonzero().flatten()
    if not len(places):
        return {}
    found: dict[int, float] = {}
    magnitudes = sizes.index_select(0, places).abs().amax(dim=-1).tolist()
    for document, size in zip(document_of[places].tolist(), magnitudes, strict=True):
        found[document] = max(size, found.get(document, 0.0))
    return found


def in_spans(spans: Sequence[tuple[int, int]], length: int, device: torch.device) -> Tensor:
    """(length,) bool: true inside any of the spans [start, end)."""
    steps = torch.zeros(length + 1, dtype=torch.int32)
    for start, end in spans:
        if start < end:
            steps[start] += 1
            steps[end] -= 1
    return (steps.cumsum(0)[:-1] > 0).to(device)
