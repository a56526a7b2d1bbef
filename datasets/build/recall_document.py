"""One document of facts that are stated, recalled on the way at all distances, and asked at the end.

    rain came bado 17 over a code for Baknox 05 fields [picture] 44 bado 17 ... a code for Baknox 05 [picture] 44

Two kinds of facts take part. *Stream* facts come again and again, each time as far back as a draw from log-uniform distances says: they
give a loss at every distance, short ones included, from which recall is learnt within minutes (gaps between mentions as in MQAR, Arora et
al. 2023, follow a power law for the same reason). *Asked* facts are stated once, at a depth that is spread evenly over the document, and
asked once at its end: they are needles, and the only ones that count in an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmctx.datasets.build.recall_words import (
    CODE,
    FILLER,
    FIRST_SHOWN,
    KEYS,
    NAMES,
    NUM_PICTURES,
    SHOWN,
    VALUES,
    value_shown,
)

_SHARES = {"recall": 0.7, "needle": 0.15, "picture": 0.15}  # of kinds among stream facts
_SHARES_WITH_SHOWN = {"recall": 0.5, "needle": 0.15, "picture": 0.15, SHOWN: 0.2}
_FILLER_SHARE = 0.2
_ROUND_FILLER = 0.1  # before a fact of a warm-up document
_MOST_ASKED = 64  # of each kind
_MOST_WITH_SHOWN = len(KEYS) // 4  # where two kinds share keys: as many keys are left to the stream as are asked
_TOKENS_PER_ASKED = 128  # a shorter document asks fewer


@dataclass(frozen=True, slots=True)
class Piece:
    """A word, or a picture by its number; `learned` if it is to be predicted."""

    word: str = ""
    picture: int = -1
    learned: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """A key and its value.

    Attributes:
        kind: one of `KINDS`, or `SHOWN`.
        key: words or a picture that stand before the value.
        value: one of `VALUES`.
        picture: number of the picture that is shown instead of the value where the fact is stated; -1 where it is written.
    """

    kind: str
    key: tuple[Piece, ...]
    value: str
    picture: int = -1

    def pieces(self, learned: bool) -> list[Piece]:
        """The fact in full, as it stands in a document; `learned` where it stood there before."""
        if self.picture >= 0 and not learned:
            return [*self.key, Piece(picture=self.picture)]
        return [*self.key, Piece(self.value, learned=learned)]


@dataclass(frozen=True, slots=True)
class Question:
    """One asked fact. Spans are [start, end) in tokens of the document, the value (or its picture) last in both.

    Attributes:
        kind: one of `KINDS`, or `SHOWN`.
        fact: where it was stated.
        ask: where it is asked.
        answer: the value.
    """

    kind: str
    fact: tuple[int, int]
    ask: tuple[int, int]
    answer: str


@dataclass(frozen=True, slots=True)
class RecallDocument:
    """A document of `length` tokens, the end-of-text token included, which the objective adds."""

    length: int
    pieces: list[Piece]
    questions: list[Question]

    def to_json(self, members: dict[int, str]) -> dict[str, Any]:
        """The json member: `segments` and what an evaluation must know. `members` names the file of each picture."""
        segments: list[dict[str, Any]] = []
        for piece in self.pieces:
            if piece.picture >= 0:
                segments.append({"image": members[piece.picture]})
            elif segments and segments[-1].get("loss", True) == piece.learned and "text" in segments[-1]:
                segments[-1]["text"] += f" {piece.word}"
            else:
                segments.append({"text": piece.word} | ({} if piece.learned else {"loss": False}))
        asked = [{"kind": q.kind, "fact": q.fact, "ask": q.ask, "answer": q.answer} for q in self.questions]
        values = sorted({piece.word for piece in self.pieces} & set(VALUES))
        return {"segments": segments, "length": self.length, "questions": asked, "values": values}


def write_document(
    length: int, rng: np.random.Generator, picture_tokens: int = 1, picture_values: bool = False
) -> RecallDocument:
    """A document of exactly `length` tokens, a picture counting `picture_tokens`; with `picture_values`, of facts of kind `SHOWN` as well.

    Raises:
        ValueError: `length` is too short for one question of each kind.
    """
    return _Writer(length, rng, picture_tokens, _SHARES_WITH_SHOWN if picture_values else _SHARES).write()


def write_round(length: int, rng: np.random.Generator) -> RecallDocument:
    """A warm-up document: a few facts of associative recall in a round that comes again and again, with little filler.

    From the second round on, nearly every word can be told from the one before it, by looking where that one stood: so many chances a
    document form the circuit that looks up and copies (induction heads, Olsson et al. 2022) within a hundred small steps.
    """
    count = int(rng.integers(3, 9))
    keys, values = rng.permutation(KEYS)[:count].tolist(), rng.permutation(VALUES)[:count].tolist()
    pieces: list[Piece] = []
    neighbours: set[tuple[str, str]] = set()

    def add(word: str) -> None:
        pair = (pieces[-1].word if pieces else "", word)
        pieces.append(Piece(word, learned=pair in neighbours and pair[0] not in FILLER))
        neighbours.add(pair)

    for number in range(length):  # more than there is room for
        if rng.random() < _ROUND_FILLER:
            pieces.append(Piece(FILLER[rng.integers(len(FILLER))]))
        add(keys[number % count])
        add(values[number % count])
    return RecallDocument(length, pieces[: length - 1], [])


class _Writer:
    """One document under way."""

    def __init__(self, length: int, rng: np.random.Generator, picture_tokens: int, shares: Mapping[str, float]) -> None:
        self.length, self.rng, self.picture_tokens, self.shares = length, rng, picture_tokens, shares
        self.keys = {
            "recall": [(Piece(word),) for word in rng.permutation(KEYS).tolist()],
            "needle": [(*map(Piece, CODE), Piece(word)) for word in rng.permutation(NAMES).tolist()],
            "picture": [(Piece(picture=number),) for number in rng.permutation(NUM_PICTURES).tolist()],
        }  # fmt: skip
        if SHOWN in shares:  # one half of the pictures are keys, the others values
            self.keys["picture"] = [key for key in self.keys["picture"] if key[0].picture < FIRST_SHOWN]
            self.keys[SHOWN] = self.keys["recall"]  # the same words: a key may have either kind of value

    def write(self) -> RecallDocument:
        most = _MOST_WITH_SHOWN if SHOWN in self.shares else _MOST_ASKED
        each = max(1, min(most, self.length // _TOKENS_PER_ASKED))
        asked = [self._new(kind) for kind in self.shares for _ in range(each)]
        stated_tokens, asked_tokens = (
            self._tokens([piece for fact in asked for piece in fact.pieces(learned)]) for learned in (False, True)
        )
        body = self.length - 1 - asked_tokens
        room = int(body * (1 - _FILLER_SHARE)) - stated_tokens
        if room < 0:
            raise ValueError(
                f"a document of {self.length} tokens holds no question of each kind; {4 * asked_tokens} tokens do"
            )
        statements = self._stream(room)
        depths = (np.arange(len(asked)) + self.rng.random(len(asked))) / len(asked)  # one in each equal stretch
        places = (depths * (len(statements) + 1)).astype(int).tolist()
        order = self.rng.permutation(len(asked)).tolist()
        for place, number in reversed(
            list(zip(places, order, strict=True))
        ):  # from the end, so that earlier places stay
            statements.insert(place, (asked[number], False))
        return self._lay_out(statements, [asked[n] for n in self.rng.permutation(len(asked))], body)

    def _new(self, kind: str) -> Fact:
        """A fact whose key the document has not had."""
        if not self.keys[kind]:
            kind = "recall"  # there are few pictures
        if kind == SHOWN:
            picture = int(self.rng.integers(FIRST_SHOWN, NUM_PICTURES))
            return Fact(kind, self.keys[kind].pop(), value_shown(picture), picture)
        return Fact(kind, self.keys[kind].pop(), VALUES[self.rng.integers(len(VALUES))])

    def _tokens(self, pieces: Sequence[Piece]) -> int:
        return sum(1 if piece.picture < 0 else self.picture_tokens for piece in pieces)

    def _stream(self, room: int) -> list[tuple[Fact, bool]]:
        """Stream facts in order, each with whether it stood there before, of at most `room` tokens.

        Each time a distance is drawn, log-uniform up to the length of the stream in facts: where the stream is still shorter, a new
        fact is stated, else the one comes again whose last mention is nearest to that distance. Where keys run out, in documents of
        thousands of tokens, the longest distances are left to asked facts.
        """
        kinds = tuple(self.shares)
        lengths = {"recall": 2, "needle": len(CODE) + 2, "picture": self.picture_tokens + 1, SHOWN: 2}
        mean = sum(self.shares[kind] * lengths[kind] for kind in kinds)
        longest = max(room / mean, 2.0)  # the stream's length, about
        bounds = np.cumsum([self.shares[kind] for kind in kinds[:-1]])
        statements: list[tuple[Fact, bool]] = []
        facts: list[Fact] = []
        last = np.zeros(len(KEYS) + len(NAMES) + NUM_PICTURES)  # the newest mention of each fact
        while True:
            number, distance = len(statements), float(np.exp(self.rng.random() * np.log(longest)))
            is_known = bool(facts) and (distance <= number or not self.keys["recall"])
            if is_known:
                chosen = int(np.abs(np.log((number - last[: len(facts)]) / distance)).argmin())
            else:
                chosen = len(facts)
                facts.append(self._new(kinds[int(np.searchsorted(bounds, self.rng.random()))]))
            room -= self._tokens(facts[chosen].pieces(is_known))
            if room < 0:
                return statements
            last[chosen] = number
            statements.append((facts[chosen], is_known))

    def _lay_out(self, statements: list[tuple[Fact, bool]], asked: list[Fact], body: int) -> RecallDocument:
        """Puts filler between the statements, until they fill `body` tokens, and the questions behind them."""
        runs = [fact.pieces(learned) for fact, learned in statements]
        filler = body - sum(map(self._tokens, runs))
        gaps = np.bincount(self.rng.integers(0, len(runs), filler), minlength=len(runs)).tolist()
        words = iter([Piece(FILLER[n]) for n in self.rng.integers(len(FILLER), size=filler)])
        pieces: list[Piece] = []
        stated: dict[tuple[Piece, ...], tuple[int, int]] = {}
        position = 0
        for (fact, _), run, gap in zip(statements, runs, gaps, strict=True):
            pieces += [next(words) for _ in range(gap)] + run
            start = position + gap
            position = start + self._tokens(run)
            stated[fact.key] = (start, position)
        questions = []
        for fact in asked:
            run = fact.pieces(learned=True)
            end = position + self._tokens(run)
            questions.append(Question(fact.kind, stated[fact.key], (position, end), fact.value))
            pieces += run
            position = end
        return RecallDocument(self.length, pieces, questions)
