"""What an audit says: where it looked, what it found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

MAX_EXAMPLES = 3
"""Leaks, and blind spots, that are told one by one for each row; the row counts all of them."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How the model is run.

    Attributes:
        backend: of attention, a name of `BACKENDS`.
        precision: `fp32`, or `bf16` for autocast.
        checkpointing: blocks are recomputed in the backward pass.
        every_pair: every ordered pair of documents is looked at; else every document and its neighbours.
    """

    backend: str
    precision: str
    checkpointing: bool
    every_pair: bool = False

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}{' checkpointed' if self.checkpointing else ''}"


@dataclass(frozen=True, slots=True)
class Place:
    """A document of the batch.

    Attributes:
        document: its number in the batch.
        key: of its sample.
        objective: that it serves.
    """

    document: int
    key: str
    objective: str

    def __str__(self) -> str:
        return f"{self.key} ({self.objective}, document {self.document})"


@dataclass(frozen=True, slots=True)
class Leak:
    """Something of one document that another one's output depends on.

    Attributes:
        mode: None where the model was not needed to see it: the packed batch itself is wrong.
        perturbation: what was changed (`token`, `patch`, `frame`, `label`), `gradient`, or `packing`.
        observed: what changed that must not have, or is not zero that must be.
        source: the document that leaks, or holds the item that leaks.
        victim: the document that is leaked into; None for a loss that all documents of an objective share. The same as the source where a
            causal document sees its own future, or where one of its items sees another.
        size: largest absolute change, or gradient.
    """

    mode: Mode | None
    perturbation: str
    observed: str
    source: Place | None
    victim: Place | None
    size: float

    def __str__(self) -> str:
        where = f"{self.mode}: " if self.mode else ""
        source, victim = self.source or "unknown", self.victim or "a shared loss"
        return f"{where}{self.perturbation} of {source} reaches {self.observed} of {victim}, by up to {self.size:.3g}"


@dataclass(frozen=True, slots=True)
class Blind:
    """A check that could not have failed: what was perturbed did not even move where it must."""

    mode: Mode
    perturbation: str
    observed: str
    document: Place | None

    def __str__(self) -> str:
        return f"{self.mode}: {self.perturbation} of {self.document or 'every document'} does not move its own {self.observed}"


@dataclass(slots=True)
class Check:
    """One row of the table: comparisons of one kind in one mode.

    Attributes:
        comparisons: documents (positions of its own past, items, shared losses) that were held against the unperturbed run.
        leaks: how many of them had changed.
        largest: by how much at most.
        blind: how many perturbed documents did not move.
    """

    mode: Mode | None
    perturbation: str
    observed: str
    comparisons: int = 0
    leaks: int = 0
    largest: float = 0.0
    blind: int = 0


@dataclass(slots=True)
class AuditReport:
    """All that an audit found.

    Attributes:
        documents, tokens: of the batch.
        rows: in the order in which they were run.
        leaks, blind: examples, at most `MAX_EXAMPLES` for each row.
        notes: what could not be done, and why.
    """

    documents: int = 0
    tokens: int = 0
    rows: dict[tuple[Mode | None, str, str], Check] = field(default_factory=dict)
    leaks: list[Leak] = field(default_factory=list)
    blind: list[Blind] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_checks(self) -> int:
        """Comparisons of all rows."""
        return sum(row.comparisons for row in self.rows.values())

    @property
    def ok(self) -> bool:
        """Something was compared, nothing leaked, and every perturbation moved what it must."""
        return self.num_checks > 0 and not any(row.leaks or row.blind for row in self.rows.values())

    def row(self, mode: Mode | None, perturbation: str, observed: str) -> Check:
        """The row of these three, a new one if need be."""
        return self.rows.setdefault((mode, perturbation, observed), Check(mode, perturbation, observed))

    def count(
        self, mode: Mode | None, perturbation: str, observed: str, comparisons: int, found: Iterable[float]
    ) -> None:
        """Adds a pass: how much was compared, and the sizes of the leaks among it."""
        row, sizes = self.row(mode, perturbation, observed), list(found)
        row.comparisons += comparisons
        row.leaks += len(sizes)
        row.largest = max([row.largest, *(math.inf if math.isnan(size) else size for size in sizes)])

    def worth_tracing(
        self, mode: Mode | None, perturbation: str, observed: str, found: Mapping[int, float]
    ) -> list[int]:
        """The documents of the largest leaks, as many as there is room for examples of this row."""
        told = [(leak.mode, leak.perturbation, leak.observed) for leak in self.leaks]
        room = max(MAX_EXAMPLES - told.count((mode, perturbation, observed)), 0)
        return sorted(found, key=lambda document: -found[document])[:room]

    def add_leak(self, leak: Leak) -> None:
        """Keeps an example; another of the same two documents tells nothing new."""
        if all(replace(leak, size=other.size) != other for other in self.leaks):
            self.leaks.append(leak)

    def add_blind(self, blind: Blind) -> None:
        """Counts a blind spot and keeps it as an example while there is room."""
        self.row(blind.mode, blind.perturbation, blind.observed).blind += 1
        told = [(other.mode, other.perturbation, other.observed) for other in self.blind]
        if told.count((blind.mode, blind.perturbation, blind.observed)) < MAX_EXAMPLES:
            self.blind.append(blind)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "ok": self.ok,
            "checks": self.num_checks,
            "documents": self.documents,
            "tokens": self.tokens,
            "leaks": [_plain(asdict(leak)) for leak in self.leaks],
            "blind": [asdict(blind) for blind in self.blind],
            "rows": [_plain(asdict(row)) for row in self.rows.values()],
            "notes": list(self.notes),
        }


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Infinite sizes become None, which JSON can say."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in tree.items()}
