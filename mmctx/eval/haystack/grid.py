"""Asks a grid of lengths and depths: what the suites `needle`, `passkey` and `world` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.planning.order import derive_key
from mmctx.eval.answers import Reply, answer
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import grouped
from mmctx.eval.haystack.build import Control, Prompt, build_prompt, least_tokens
from mmctx.eval.haystack.config import GridConfig
from mmctx.eval.haystack.probe import Lacking, Maker, Probe, Speller
from mmctx.eval.haystack.sources import Haystack
from mmctx.eval.heat_map import Outcome, score, summarise

_CONTROLS: tuple[Control, ...] = ("removed", "alone")


class Kind(NamedTuple):
    """A kind of question.

    Attributes:
        make: draws one.
        grader: one of `mmctx.eval.answers.GRADERS`.
        has_depth: whether what is asked stands at a depth of the grid; else it has several places, or none.
    """

    make: Maker
    grader: str = "contains"
    has_depth: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One document to be asked: everything but its haystack."""

    kind: str
    length: int
    number: int
    probe: Probe
    control: Control | None = None


class _Found(NamedTuple):
    outcome: Outcome
    control: Control | None
    example: dict[str, Any]


def run_grid(
    context: EvalContext, suite: str, config: GridConfig, kinds: Mapping[str, Kind], haystack: Haystack
) -> dict[str, Any]:
    """`summarise` of all answers, with `controls` for each kind, an example of each, the grid, and what was left out and why.

    The controls ask the questions of the shortest length again: `removed` has haystack in the place of the needles and must be at chance;
    `alone` has no haystack and must be near 100%.
    """
    speller = Speller(context.data.tokenizer)
    lengths = config.resolved_lengths(context.data.config.context_length)
    asks: list[Ask] = []
    left_out: list[dict[str, Any]] = []
    for kind in kinds:
        try:
            of_kind, reasons = plan_kind(suite, kind, kinds[kind], config, lengths, speller)
        except Lacking as error:
            of_kind, reasons = [], [{"kind": kind, "length": None, "reason": str(error)}]
        asks += of_kind
        left_out += reasons
    alike = (list(part) for _, part in groupby(asks, lambda ask: (ask.kind, ask.length, ask.control)))
    groups = [
        group for part in alike for group in grouped(part, [ask.length for ask in part], context.data.config.bin_tokens)
    ]
    found = list(each(context.map(suite, groups, lambda group: _ask(context, config, kinds, group, haystack, speller))))
    results = summarise((one.outcome for one in found if one.control is None), config.depths)
    for kind, part in results["kinds"].items():
        controls = {
            control: [one.outcome for one in found if one.control == control and one.outcome.kind == kind]
            for control in _CONTROLS
        }
        part["controls"] = {control: score(outcomes) for control, outcomes in controls.items()}
    examples = {one.outcome.kind: one.example for one in reversed(found) if one.control is None}
    return {
        **results,
        "grid": {
            "lengths": list(lengths),
            "depths": list(config.depths),
            "samples": config.samples,
            "haystack": config.haystack.kind,
        },
        "examples": [examples[kind] for kind in results["kinds"]],
        "left_out": left_out,
    }


def grid_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The mean share at each length, and the effective length by RULER's rule."""
    if not results.get("lengths"):
        return {}
    shares = {length: scores["share"] for length, scores in results["lengths"].items()}
    return shares | {"effective": float(results["effective"]["ruler"]["length"])}


def plan_kind(
    suite: str, name: str, kind: Kind, config: GridConfig, lengths: Sequence[int], speller: Speller
) -> tuple[list[Ask], list[dict[str, Any]]]:
    """All questions of one kind, controls included, and the lengths that cannot be asked, with reasons.

    Every rank draws the same ones, from `config.seed` and the place in the grid.
    """
    columns: list[float | None] = list(config.depths) if kind.has_depth else [None]
    count = config.samples if kind.has_depth else config.samples * len(config.depths)
    asks: list[Ask] = []
    left_out: list[dict[str, Any]] = []
    for length in lengths:
        probes = []
        for place, depth in enumerate(columns):
            for number in range(place * count, (place + 1) * count):
                rng = np.random.default_rng(derive_key(config.seed, "evaluate", suite, name, length, number))
                probes.append(kind.make(rng, depth))
        if not asks and (text := speller.illegible(text for probe in probes for text in probe.texts())):
            reason = f"the tokenizer has no tokens for {text.strip()!r}"
            return [], [{"kind": name, "length": None, "reason": reason}]
        least = max(least_tokens(probe, speller) for probe in probes)
        if least > length:
            reason = f"needs {least} tokens without any haystack"
            left_out.append({"kind": name, "length": length, "reason": reason})
            continue
        if not asks:
            asks += [Ask(name, length, n, probe, control) for control in _CONTROLS for n, probe in enumerate(probes)]
        asks += [Ask(name, length, n, probe) for n, probe in enumerate(probes)]
    return asks, left_out


def build_asked(config: GridConfig, ask: Ask, haystack: Haystack, speller: Speller) -> Prompt:
    """Its document: the same one wherever and whenever it is built."""
    rng = np.random.default_rng(derive_key(config.seed, "haystack", ask.kind, ask.length, ask.number))
    return build_prompt(ask.probe, ask.length, haystack, speller, rng, ask.control)


def _ask(
    context: EvalContext,
    config: GridConfig,
    kinds: Mapping[str, Kind],
    group: Sequence[Ask],
    haystack: Haystack,
    speller: Speller,
) -> list[_Found]:
    prompts = [build_asked(config, ask, haystack, speller).document for ask in group]
    grader = kinds[group[0].kind].grader if config.generate else None
    replies = answer(context, [ask.probe for ask in group], prompts, speller, grader)
    return [
        _Found(
            Outcome(ask.kind, ask.length, ask.probe.depths, ask.probe.chance, reply), ask.control, _example(ask, reply)
        )
        for ask, reply in zip(group, replies, strict=True)
    ]


def _example(ask: Ask, reply: Reply) -> dict[str, Any]:
    return {
        "kind": ask.kind,
        "length": ask.length,
        "question": "".join(part if isinstance(part, str) else "[...]" for part in ask.probe.question).strip(),
        "references": list(ask.probe.references),
        "prediction": reply.text.strip(),
        "choice": reply.choice,
    }
