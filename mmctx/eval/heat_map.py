"""From answers to heat maps of length and depth, and to effective lengths of context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmctx.eval.answers import Reply
from mmctx.eval.intervals import PASSES, longest_passing, longest_unbroken, wilson_interval

Score = dict[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One document's answer.

    Attributes:
        kind: of the question.
        length: tokens of the document.
        depths: where what each reference asks for stands; empty where that has no place.
        chance: share of references that guessing finds.
        reply: how it was answered.
    """

    kind: str
    length: int
    depths: tuple[float, ...]
    chance: float
    reply: Reply


def score(outcomes: Sequence[Outcome]) -> Score:
    """Scores of whole documents; see `summarise` for the names."""
    return _score(
        [
            (float(np.mean(o.reply.found)), None if o.reply.exact is None else float(np.mean(o.reply.exact)), o)
            for o in outcomes
        ]
    )


def summarise(outcomes: Iterable[Outcome], depths: Sequence[float]) -> dict[str, Any]:
    """`{"kinds": {kind: {"lengths", "heat", "effective"}}, "lengths", "effective"}` of answered questions.

    A score is `share`, the mean share of references that are among the likeliest candidates, with its Wilson interval `low` to `high`;
    `exact`, that of references that were written; `complete`, the share of documents with every reference chosen; mean `log_prob`,
    `chance` and `n` documents. `heat` tells them apart by the place of what is asked for, at the nearest of `depths`.
    """
    by_kind: dict[str, dict[int, list[Outcome]]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, {}).setdefault(outcome.length, []).append(outcome)
    kinds = {kind: _of_kind(found, depths) for kind, found in by_kind.items()}
    lengths = _over_kinds([part["lengths"] for part in kinds.values()])
    return {"kinds": kinds, "lengths": lengths, "effective": effective(lengths)}


def effective(lengths: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """Effective lengths of context, in tokens; 0 where not even the shortest passes.

    `ruler` is the longest length whose share reaches `PASSES`; `strict` the longest up to which all lengths do and lie above chance with
    the lower end of their interval; `exact` as `ruler`, of exact answers, which is RULER's own. `low` and `high` are what the lower and
    upper ends of the intervals give.
    """
    above = {int(length): s["low"] > s["chance"] for length, s in lengths.items()}

    def each(find: Callable[[dict[int, float]], int], names: Mapping[str, str]) -> dict[str, int]:
        return {name: find({int(length): s[column] for length, s in lengths.items()}) for name, column in names.items()}

    share = {"length": "share", "low": "low", "high": "high"}
    found = {"ruler": each(longest_passing, share), "strict": each(lambda s: longest_unbroken(s, above), share)}
    if all("exact" in s for s in lengths.values()):
        exact = {"length": "exact", "low": "exact_low", "high": "exact_high"}
        found["exact"] = each(longest_passing, exact)
    return found


def passes(scores: Mapping[str, float]) -> bool:
    """Whether a length passes: its share reaches `PASSES`, and the interval is above chance."""
    return scores["share"] >= PASSES and scores["low"] > scores["chance"]


def _of_kind(found: Mapping[int, Sequence[Outcome]], depths: Sequence[float]) -> dict[str, Any]:
    lengths = {str(length): score(outcomes) for length, outcomes in sorted(found.items())}
    heat = {str(length): _row(outcomes, depths) for length, outcomes in sorted(found.items())}
    return {"lengths": lengths, "effective": effective(lengths)} | ({"heat": heat} if any(heat.values()) else {})


def _row(outcomes: Sequence[Outcome], depths: Sequence[float]) -> dict[str, Score]:
    """One length of a heat map: each reference counts at the depth of what it asks for."""
    cells: dict[float, list[tuple[float, float | None, Outcome]]] = {}
    for outcome in outcomes:
        exact = outcome.reply.exact or [None] * len(outcome.depths)
        for depth, chosen, written in zip(outcome.depths, outcome.reply.found, exact, strict=False):
            nearest = min(depths, key=lambda column: abs(column - depth))
            cells.setdefault(nearest, []).append((chosen, written, outcome))
    return {f"{depth:g}": _score(cells[depth]) for depth in sorted(cells)}


def _score(found: Sequence[tuple[float, float | None, Outcome]]) -> Score:
    """Of (share chosen, share written, its document)."""
    n = len(found)
    low, high = wilson_interval(sum(chosen for chosen, _, _ in found), n)
    scores = {"share": float(np.mean([chosen for chosen, _, _ in found])), "low": low, "high": high}
    written = [exact for _, exact, _ in found if exact is not None]
    if written:
        low, high = wilson_interval(sum(written), n)
        scores |= {"exact": float(np.mean(written)), "exact_low": low, "exact_high": high}
    return scores | {
        "complete": float(np.mean([all(o.reply.found) for _, _, o in found])),
        "log_prob": float(np.mean([o.reply.log_prob for _, _, o in found])),
        "chance": float(np.mean([o.chance for _, _, o in found])),
        "n": n,
    }


def _over_kinds(kinds: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """The mean over the kinds at each length, each kind counting the same, as in RULER. `n` is that of all their documents.

    The interval is that of a mean of independent shares: the kinds' own intervals, half-widths added in quadrature.
    """
    lengths = sorted({int(length) for kind in kinds for length in kind})
    found: dict[str, Score] = {}
    for length in map(str, lengths):
        parts = [kind[length] for kind in kinds if length in kind]
        scores = {name: float(np.mean([part[name] for part in parts])) for name in parts[0] if name != "n"}
        for middle, low, high in (("share", "low", "high"), ("exact", "exact_low", "exact_high")):
            if middle in scores:
                below = [part[middle] - part[low] for part in parts]
                above = [part[high] - part[middle] for part in parts]
                scores[low] = scores[middle] - float(np.linalg.norm(below)) / len(parts)
                scores[high] = scores[middle] + float(np.linalg.norm(above)) / len(parts)
        found[length] = scores | {"n": int(sum(part["n"] for part in parts)), "kinds": len(parts)}
    return found
