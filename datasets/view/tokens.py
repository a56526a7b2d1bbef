"""A document's tokens as pieces of text: what stands there, what is predicted, what is hidden, where its media lie.

Shapes: L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmctx.objectives.base import Names
from mmctx.pack import IGNORE_INDEX
from mmctx.tokenizer import TextTokenizer

_LONGEST_CHARACTER = 4  # tokens: a byte each, of UTF-8
_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token, or the few that make one character; or a run of media slots.

    Attributes:
        text: of the tokens as they are fed; for media, its kind.
        state: ``""``, ``target`` (the state before predicts it), ``hidden`` (its own state, or the one before, predicts something else than
            what is fed), or ``media``.
        answer: what a hidden piece stands for.
        special: whether it is a special token.
        pooled: whether its hidden state is the document's embedding.
        title: what pointing at it says.
        media: name of the media in the page, for media.
    """

    text: str
    state: str = ""
    answer: str = ""
    special: bool = False
    pooled: bool = False
    title: str = ""
    media: str = ""


class Predicts(Protocol):
    """What a page must know of an objective; see `mmctx.objectives.base.DataHalf`."""

    ahead: int
    answers: Names


class TokenReader:
    """Turns ids into text, one run that makes whole characters at a time.

    Args:
        tokenizer: of the run.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._hf = tokenizer.hf
        self._is_word = tokenizer.is_word
        self._known: dict[tuple[int, ...], str] = {}

    def runs(self, ids: np.ndarray) -> Iterator[tuple[int, int, str]]:
        """(first, end, text) of each run of (L,) ids."""
        before: tuple[int, ...] = ()
        first = 0
        while first < len(ids):
            end = first + 1
            text = self._text(before, tuple(ids[first:end].tolist()))
            if self.is_special(int(ids[first])):
                text = str(self._hf.convert_ids_to_tokens(int(ids[first])))
            else:
                while text.endswith(_UNFINISHED) and end < len(ids) and end - first < _LONGEST_CHARACTER:
                    longer = self._text(before, tuple(ids[first : end + 1].tolist()))
                    end += 1
                    text = longer
            yield first, end, text
            before, first = tuple(ids[max(first, end - 1) : end].tolist()), end

    def is_special(self, token: int) -> bool:
        """Whether a token is no ordinary text."""
        return token >= len(self._is_word) or not self._is_word[token]

    def one(self, token: int) -> str:
        """Text of one token alone."""
        return str(self._hf.convert_ids_to_tokens(token)) if self.is_special(token) else self._text((), (token,))

    def _text(self, before: tuple[int, ...], ids: tuple[int, ...]) -> str:
        """What `ids` add behind `before`: some tokenizers drop the space in front of the first token of all."""
        whole, start = self._decode(before + ids), self._decode(before)
        return whole[len(start) :] if whole.startswith(start) else self._decode(ids)

    def _decode(self, ids: tuple[int, ...]) -> str:
        if ids not in self._known:
            options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            self._known[ids] = str(self._hf.decode(list(ids), **options)) if ids else ""
        return self._known[ids]


def read_document(
    ids: np.ndarray,
    labels: np.ndarray,
    half: Predicts,
    media: Mapping[int, tuple[int, str, str]],
    pooled: set[int],
    reader: TokenReader,
) -> list[Piece]:
    """The pieces of one document.

    Args:
        ids: (L,) as fed.
        labels: (L,) target of each position's hidden state, `IGNORE_INDEX` where there is none.
        half: of the objective that made it: where its labels belong and what they stand for.
        media: first slot -> (slots, kind, name in the page) of each of its media.
        pooled: positions of embeddings.
        reader: of the run's tokenizer.
    """
    aims = np.full_like(labels, IGNORE_INDEX)  # (L,) what is predicted of each place, by whichever state
    aims[half.ahead :] = labels[: len(labels) - half.ahead]
    pieces: list[Piece] = []
    position = 0
    for start in [*sorted(media), len(ids)]:
        for first, end, text in reader.runs(ids[position:start]):
            span = slice(position + first, position + end)
            pieces.append(_piece(span, text, ids, aims, half, pooled, reader))
        if start == len(ids):
            break
        count, kind, name = media[start]
        title = f"{count} {kind} slots, positions {start} to {start + count - 1}"
        pieces.append(Piece(text=kind, state="media", title=title, media=name))
        position = start + count
    return pieces


def _piece(
    span: slice,
    text: str,
    ids: np.ndarray,
    aims: np.ndarray,
    half: Predicts,
    pooled: set[int],
    reader: TokenReader,
) -> Piece:
    title = f"position {span.start}" + (f" to {span.stop - 1}" if span.stop - span.start > 1 else "")
    title += f", token {' '.join(map(str, ids[span].tolist()))}"
    state = answer = ""
    aimed = aims[span] != IGNORE_INDEX
    found = aims[span][aimed].tolist()
    kept = found == ids[span][aimed].tolist()
    if found:
        state = "target" if kept and half.ahead else "hidden"
        title += f", predicted from position {span.start - half.ahead}" if half.ahead else ""
    if state == "hidden":
        answer = "".join(half.answers[aim] if half.answers else reader.one(aim) for aim in found)
        title += f", where {answer!r} is right" if half.ahead else f", predicts {answer!r} at its own place"
        title += ", which was left to be seen" if kept else ""
    is_pooled = any(place in pooled for place in range(span.start, span.stop))
    if is_pooled:
        title += (
            ", its hidden state is the embedding" if len(pooled) == 1 else ", the embedding is the mean over its like"
        )
    special = reader.is_special(int(ids[span.start]))
    return Piece(text=text, state=state, answer=answer, special=special, pooled=is_pooled, title=title)
