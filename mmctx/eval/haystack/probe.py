"""A question about needles, before it stands in a document.

Parts are kept as texts, each turned into tokens by itself: a value has the same tokens in its needle, in the list of candidates and in the
answer, whatever the tokenizer merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mmctx.eval.haystack.word_list import WordList
from mmctx.pack import MediaItem
from mmctx.tokenizer import TextTokenizer

Part = str | np.ndarray | MediaItem
"""Text, ids (L,) int64, or a picture or clip."""


class Lacking(Exception):
    """There is too little to ask about; the message is the reason that the results give."""


class Needle(NamedTuple):
    """A statement and where it is hidden.

    `asked` tells it from distractors: those of the same form that are not asked for.
    """

    parts: tuple[Part, ...]
    depth: float
    asked: bool = True


class Choice(NamedTuple):
    """Candidates that continue the question.

    `lead` is text between the question and each candidate: the right answers before this one. `right` numbers the right ones.
    """

    candidates: tuple[str, ...]
    right: tuple[int, ...]
    lead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Needles, a question and what counts as an answer.

    Attributes:
        kind: of the question.
        needles: in reading order where their depths are equal.
        question: ends where the answer begins.
        choices: one whose `right` are the references, or one for each reference.
        references: the right answers; each is found or not.
        depths: of what each reference asks for; empty where that has no place.
        answer: the right answer in full, as it would stand behind the question.
        labels: all words that could be answers, for grading by labels.
        asked_labels: those of them that the question itself holds.
        avoid: names that the haystack must not mention.
        words: stand in the document instead of a haystack and needles.
    """

    kind: str
    needles: tuple[Needle, ...]
    question: tuple[Part, ...]
    choices: tuple[Choice, ...]
    references: tuple[str, ...]
    depths: tuple[float, ...]
    answer: tuple[str, ...]
    labels: tuple[str, ...] = ()
    asked_labels: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    words: WordList | None = None

    @property
    def chance(self) -> float:
        """Share of references that a guess among the candidates finds."""
        return float(np.mean([len(choice.right) / len(choice.candidates) for choice in self.choices]))

    def texts(self) -> Iterable[str]:
        """All that the tokenizer must be able to write."""
        for part in (*(part for needle in self.needles for part in needle.parts), *self.question, *self.answer):
            if isinstance(part, str):
                yield part
        for choice in self.choices:
            yield from choice.candidates
        if self.words is not None:
            yield from self.words.shares


class Speller:
    """Token ids of texts; each text is encoded once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, np.ndarray] = {}

    def ids(self, text: str) -> np.ndarray:
        """(L,) int64."""
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text)
        return self._known[text]

    def join(self, texts: Iterable[str]) -> np.ndarray:
        """(L,) int64 ids of several texts, each encoded by itself."""
        return np.concatenate([np.zeros(0, np.int64), *(self.ids(text) for text in texts)])

    def encoded(self, parts: Iterable[Part]) -> list[np.ndarray | MediaItem]:
        """The parts with texts as ids."""
        return [self.ids(part) if isinstance(part, str) else part for part in parts]

    def count(self, parts: Iterable[Part]) -> int:
        """Tokens of all parts."""
        return sum(size(part) for part in self.encoded(parts))

    def illegible(self, texts: Iterable[str]) -> str | None:
        """The first text that the tokenizer has no tokens for, if there is one."""
        unknown = self.tokenizer.hf.unk_token_id
        for text in texts:
            ids = self.ids(text)
            if not len(ids) or (unknown is not None and (ids == unknown).any()):
                return text
        return None


def size(part: np.ndarray | MediaItem) -> int:
    """Tokens of a part."""
    return part.num_tokens if isinstance(part, MediaItem) else len(part)


Maker = Callable[[np.random.Generator, float | None], Probe]
"""Draws a probe whose needle stands at a depth; None where the kind has none."""


def ranked(values: Sequence[str], right: Sequence[str], rng: np.random.Generator) -> Choice:
    """A choice of `values` and `right` in random order: equal log-probabilities then give each the same chance."""
    every = [*dict.fromkeys([*right, *values])]
    order = rng.permutation(len(every)).tolist()
    shuffled = [every[n] for n in order]
    return Choice(tuple(f" {value}" for value in shuffled), tuple(shuffled.index(value) for value in right))
