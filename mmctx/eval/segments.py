"""The words, pictures and sounds that a document's tokens make up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmctx.pack import Document, MediaItem
from mmctx.tokenizer import TextTokenizer

_PIECES = 8  # tokens that may together make up one character


class Segment(NamedTuple):
    """A stretch of a document that people read as one.

    Attributes:
        kind: `text`, `image` or `audio`.
        start: its first token in the document.
        end: behind its last.
        text: of a word, the space before it included.
        item: the picture or clip.
    """

    kind: str
    start: int
    end: int
    text: str = ""
    item: MediaItem | None = None


def segments_of(document: Document, end: int, tokenizer: TextTokenizer) -> list[Segment]:
    """The words and media of a document's first `end` tokens, in order: each token belongs to exactly one."""
    found: list[Segment] = []
    place = 0
    for offset, item in document.media:
        if offset >= end:
            break
        found += _words(document.input_ids[place:offset], place, tokenizer)
        place = min(offset + item.num_tokens, end)
        found.append(Segment(item.kind, offset, place, item=item))
    return [*found, *_words(document.input_ids[place:end], place, tokenizer)]


def sums(scores: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """(S,) what the tokens of each segment add up to."""
    return np.array([scores[segment.start : segment.end].sum() for segment in segments])


def shares(scores: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """(S,) the absolute sums of the segments, as shares of all of them; zeros where all are zero."""
    found = np.abs(sums(scores, segments))
    return found / found.sum() if found.any() else found


def _words(ids: np.ndarray, start: int, tokenizer: TextTokenizer) -> Iterator[Segment]:
    """Words with what follows them up to the next space; of scripts without spaces, what the tokenizer keeps together."""
    word, first = "", start
    for text, place, _ in _decoded(ids, start, tokenizer):
        if word and (text[:1].isspace() or not _joins(word[-1], text[:1])):
            yield Segment("text", first, place, word)
            word, first = "", place
        word += text
    if len(ids):
        yield Segment("text", first, start + len(ids), word)


def _joins(before: str, after: str) -> bool:
    """Whether two neighbouring characters stand in one word: letters of scripts that put spaces between words, and punctuation."""
    return not after or ((before < "\u2e80" and after < "\u2e80") and not before.isspace())


def _decoded(ids: np.ndarray, start: int, tokenizer: TextTokenizer) -> Iterator[tuple[str, int, int]]:
    """(text, first place, end) of the smallest groups of tokens that make up whole characters.

    A group is decoded behind the one before it, since some tokenizers drop the space of a text's first token.
    """
    before: list[int] = []
    group: list[int] = []
    for number, id in enumerate(ids.tolist()):
        group.append(id)
        text = str(tokenizer.hf.decode([*before, *group]))[len(str(tokenizer.hf.decode(before))) :]
        if text.endswith("\ufffd") and len(group) < _PIECES and number + 1 < len(ids):
            continue
        end = start + number + 1
        yield text, end - len(group), end
        before, group = group, []
