"""One builder for all documents of the long-context suites: a haystack with needles, and a question behind it, exact in its length."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from mmctx.eval.haystack.probe import Needle, Probe, Speller, size
from mmctx.eval.haystack.sources import Haystack, Noise, stretch
from mmctx.objectives.base import lay_out
from mmctx.pack import IGNORE_INDEX, Document, MediaItem

Control = Literal["removed", "alone"]
Pieces = list[np.ndarray | MediaItem]


class Prompt(NamedTuple):
    """A document up to where its answer begins.

    `starts` holds the first token of each needle that stands in it, in the order of the probe's needles.
    """

    document: Document
    starts: tuple[int, ...]


def least_tokens(probe: Probe, speller: Speller) -> int:
    """Tokens of the shortest document that holds the needles, the question and the answer."""
    body = sum(speller.count(needle.parts) for needle in probe.needles)
    if probe.words is not None:
        body = probe.words.least_tokens(lambda word: len(speller.ids(word)))
    return body + _frame_tokens(probe, speller)


def build_prompt(
    probe: Probe,
    length: int,
    haystack: Haystack,
    speller: Speller,
    rng: np.random.Generator,
    control: Control | None = None,
) -> Prompt:
    """The document up to where its answer begins: together with its right answer it has exactly `length` tokens, of text, pictures and
    sound.

    Args:
        probe: what is hidden and asked.
        length: in model tokens.
        haystack: what it is hidden in.
        speller: of the run's tokenizer.
        rng: draws the haystack.
        control: `removed` has haystack in the place of all needles; `alone` has the needles that are asked for, and no haystack: it is
            shorter.

    Raises:
        ValueError: `length` is less than `least_tokens`.
    """
    room, begin = length - _frame_tokens(probe, speller), speller.tokenizer.begin
    starts: tuple[int, ...] = ()
    if probe.words is not None:
        body = _word_body(probe, room, speller, rng, control)
    else:
        needles = [] if control == "removed" else [n for n in probe.needles if n.asked or control is None]
        filler = 0 if control == "alone" else room - sum(speller.count(needle.parts) for needle in needles)
        if filler < 0:
            raise ValueError(f"{probe.kind} needs {length - filler} tokens, but the document is to have {length}")
        body, starts = _hide(needles, stretch(haystack.units(rng, probe.avoid), filler, speller), speller)
    parts = [begin, *body, *speller.encoded(probe.question)]
    input_ids, media = lay_out(parts, speller.tokenizer.placeholder_ids)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    key = f"{probe.kind} of {length} tokens"
    return Prompt(
        Document("captioning", input_ids, labels, causal=True, media=media, key=key),
        tuple(len(begin) + at for at in starts),
    )


def _hide(needles: list[Needle], units: Pieces, speller: Speller) -> tuple[Pieces, tuple[int, ...]]:
    """Each needle at its depth, moved back to where a unit ends; and where each then starts."""
    ends = np.cumsum([0, *(size(unit) for unit in units)])
    places = [int(np.searchsorted(ends, needle.depth * ends[-1] + 1e-6, side="right")) - 1 for needle in needles]
    starts = [0] * len(needles)
    body: Pieces = []
    held = 0
    for place in range(len(units) + 1):
        for number in [n for n, at in enumerate(places) if at == place]:
            starts[number] = held
            body += speller.encoded(needles[number].parts)
            held += speller.count(needles[number].parts)
        body += units[place : place + 1]
        held += sum(map(size, units[place : place + 1]))
    return body, tuple(starts)


def _word_body(probe: Probe, room: int, speller: Speller, rng: np.random.Generator, control: Control | None) -> Pieces:
    words = probe.words
    assert words is not None

    def cost(word: str) -> int:
        return len(speller.ids(word))

    if control == "alone":
        return list(speller.encoded(words.alone(rng)))
    chosen = speller.encoded((words.even() if control == "removed" else words).drawn(room, cost, rng))
    left = room - sum(map(size, chosen))
    if left < 0:
        raise ValueError(f"{probe.kind} needs {-left} tokens more than there are")
    return [*stretch(Noise().units(rng, ()), left, speller), *chosen]


def _frame_tokens(probe: Probe, speller: Speller) -> int:
    """Of what documents begin with, the question and the answer."""
    return len(speller.tokenizer.begin) + speller.count(probe.question) + len(speller.join(probe.answer))
