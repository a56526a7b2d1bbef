"""RULER's tasks (Hsieh et al. 2024): what is hidden, asked and compared.

Questions end as needles begin, in RULER's words, so that an untuned model that has learnt to look up and copy can answer. The same
number of candidates stands for each right answer, so that chance is the same for all kinds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmctx.eval.haystack.config import NeedleConfig
from mmctx.eval.haystack.probe import Choice, Needle, Probe, ranked
from mmctx.eval.haystack.word_list import WordList
from mmctx.eval.haystack.words import (
    coded_words,
    enumerated,
    keys,
    listed,
    numbers,
    plain_words,
    spread,
    variables,
)

_COMMON = 0.5
"""Share of a word list that its common words take."""
_ZIPF = 2.0
"""RULER's exponent of word frequencies."""

TextMaker = Callable[[NeedleConfig, np.random.Generator, float | None], Probe]


def single(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """The magic number of a key, among numbers that the document does not hold."""
    return _keyed("single", config, rng, depth or 0.0, others=0)


def multi_key(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """The magic number of a key, among those of other keys in the same document."""
    return _keyed("multi_key", config, rng, depth or 0.0, others=config.needles)


def _keyed(kind: str, config: NeedleConfig, rng: np.random.Generator, depth: float, others: int) -> Probe:
    names, values = keys(rng, 1 + others), numbers(rng, max(config.candidates, 1 + others), config.digits)
    places = [depth, *rng.random(others).tolist()]
    needles = tuple(_number_needle(*fact, n == 0) for n, fact in enumerate(zip(names, values, places, strict=False)))
    return Probe(
        kind,
        needles,
        (f" What is the special magic number for {names[0]}? {_stem(names[0])}",),
        (ranked(values[: config.candidates], values[:1], rng),),
        (values[0],),
        (depth,),
        (f" {values[0]}",),
    )


def multi_value(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """All magic numbers of one key."""
    (name,) = keys(rng, 1)
    values = numbers(rng, config.candidates * config.needles, config.digits)
    asked, depths = values[: config.needles], spread(rng, config.needles)
    needles = tuple(_number_needle(name, value, place) for value, place in zip(asked, depths, strict=True))
    question = f" What are all the special magic numbers for {name}? The special magic numbers for {name} are:"
    return _several("multi_value", needles, question, values, asked, depths, rng)


def multi_query(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """The magic numbers of several keys, asked in another order than they are stated in."""
    names = keys(rng, config.needles)
    values = numbers(rng, config.candidates * config.needles, config.digits)
    asked, depths = values[: config.needles], spread(rng, config.needles)
    needles = tuple(map(_number_needle, names, asked, depths))
    order = rng.permutation(len(names)).tolist()
    question = f" What are the special magic numbers for {enumerated([names[n] for n in order])}? The special magic numbers are:"
    return _several(
        "multi_query", needles, question, values, [asked[n] for n in order], [depths[n] for n in order], rng
    )


def variable_tracking(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """All variables of a chain of assignments; another chain, of another value, stands in between."""
    count = config.needles
    names = variables(rng, config.candidates * count)
    asked, other = names[:count], names[count : 2 * count]
    values = numbers(rng, 2, config.digits)
    depths = spread(rng, count)
    needles = [
        *_chain(asked, values[0], depths, True),
        *_chain(other, values[1], spread(rng, count), False),
    ]
    question = f" Find all variables that are assigned the value {values[0]}. They are:"
    return _several("variable_tracking", tuple(needles), question, names, asked, depths, rng)


def common_words(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """The commonest words of a list: they make up half of it, evenly; the rest shares the other half."""
    words = plain_words(rng, config.candidates * config.needles)
    count, rest = config.needles, len(words) - config.needles
    shares = [_COMMON / count] * count + [(1 - _COMMON) / rest] * rest
    return _most_frequent("common_words", words, shares, count, (), rng)


def frequent_words(config: NeedleConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """The commonest of words without meaning, whose frequencies follow Zipf's law; the commonest of all, `...`, is known not to count."""
    words = coded_words(rng, config.candidates * config.needles)
    weights = (np.arange(len(words) + 1) + 1.0) ** -_ZIPF
    return _most_frequent("frequent_words", words, (weights / weights.sum()).tolist(), config.needles, ("...",), rng)


def _number_needle(key: str, value: str, depth: float, asked: bool = True) -> Needle:
    return Needle((f" {_stem(key)}", f" {value}", "."), depth, asked)


def _stem(key: str) -> str:
    return f"One of the special magic numbers for {key} is:"


def _chain(names: list[str], value: str, depths: list[float], asked: bool) -> list[Needle]:
    sources = [value, *(f"VAR {name}" for name in names)]
    return [
        Needle((" VAR", f" {name}", f" = {source}."), depth, asked)
        for name, source, depth in zip(names, sources, depths, strict=False)
    ]


def _several(
    kind: str,
    needles: tuple[Needle, ...],
    question: str,
    values: list[str],
    asked: list[str],
    depths: list[float],
    rng: np.random.Generator,
) -> Probe:
    choice = ranked(values, asked, rng)
    return Probe(kind, needles, (question,), (choice,), tuple(asked), tuple(depths), listed(asked))


def _most_frequent(
    kind: str, words: list[str], shares: list[float], count: int, noise: tuple[str, ...], rng: np.random.Generator
) -> Probe:
    asked = words[:count]
    choice: Choice = ranked(words, asked, rng)
    spaced = [f" {word}" for word in (*noise, *words)]
    body = WordList(
        dict(zip(spaced, shares, strict=True)), tuple(f" {word}" for word in asked), tuple(spaced[: len(noise)])
    )
    ignored = f" Do not count {noise[0]!r}." if noise else ""
    question = f" What are the {count} most common words in the list above?{ignored} They are:"
    return Probe(kind, (), (question,), (choice,), tuple(asked), (), listed(asked), words=body)


TEXT_KINDS: dict[str, tuple[TextMaker, bool]] = {
    "single": (single, True),
    "multi_key": (multi_key, True),
    "multi_value": (multi_value, False),
    "multi_query": (multi_query, False),
    "variable_tracking": (variable_tracking, False),
    "common_words": (common_words, False),
    "frequent_words": (frequent_words, False),
}
"""Each maker, and whether what it asks stands at a depth of the grid."""
