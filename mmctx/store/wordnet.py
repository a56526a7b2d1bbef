"""WordNet's data files (Fellbaum 1998; format: wndb(5WN)) as triples of words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmctx.errors import DataError

RELATIONS = {
    "@": "is a kind of",
    "@i": "is an instance of",
    "#m": "is a member of",
    "#s": "is a substance of",
    "#p": "is a part of",
    "!": "is the opposite of",
    "*": "entails",
    ">": "causes",
    "=": "is an attribute of",
    "&": "is similar to",
    "^": "see also",
    "$": "is in a group with",
    "+": "is related in form to",
    "<": "is a participle of",
    "\\": "pertains to",
    ";c": "belongs to the topic",
    ";r": "belongs to the region",
    ";u": "is used as",
}
"""Pointers and their words. Those that only turn another one round (`~`, `%`, `-`) are left out: their mirror says the same."""
MEANS = "means"
"""Relation between a word and its gloss."""
_FILES = ("noun", "verb", "adj", "adv")
_PLACES = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}


def read_wordnet(where: Path) -> Iterator[tuple[str, str, str, str]]:
    """(id, subject, relation, object) of every pointer and gloss, in the order of the files.

    A pointer between synsets is told of the first words of both, a lexical one of the words that it names. Ids hold part of speech, offset,
    relation and target, and so name the sense, not the word.

    Args:
        where: the folder of `data.noun`, `data.verb`, `data.adj` and `data.adv`, or one of them in such a folder.

    Raises:
        DataError: a file is missing, or a line is not in WordNet's format.
    """
    folder = where if where.is_dir() else where.parent
    files = {place: folder / f"data.{place}" for place in _FILES}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise DataError(
            f"{', '.join(missing)}: missing; WordNet's four data files are read together (apt-get install wordnet-base)"
        )
    words = {(place, offset): found for place, path in files.items() for offset, found in _words(path)}
    for place, path in files.items():
        if where.is_dir() or path == where:
            yield from _triples(place, path, words)


def _words(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(offset, words) of each synset."""
    for number, fields, _ in _lines(path):
        try:
            count = int(fields[3], 16)
            yield fields[0], [_plain(fields[4 + 2 * n]) for n in range(count)]
        except (ValueError, IndexError):
            raise _broken(path, number, fields) from None


def _triples(place: str, path: Path, words: dict[tuple[str, str], list[str]]) -> Iterator[tuple[str, str, str, str]]:
    for number, fields, gloss in _lines(path):
        try:
            start = 4 + 2 * int(fields[3], 16)
            own = words[place, fields[0]]
            if gloss:
                yield f"wordnet:{place}:{fields[0]}:{MEANS}", own[0], MEANS, gloss
            for n in range(int(fields[start])):
                symbol, offset, pos, ends = fields[start + 1 + 4 * n : start + 5 + 4 * n]
                relation = RELATIONS.get(symbol)
                if relation is None:
                    continue
                target = words[_PLACES[pos], offset]
                first, second = (
                    int(ends[:2], 16),
                    int(ends[2:], 16),
                )  # 0000: the synsets as a whole; else a word of each, from 1
                id = f"wordnet:{place}:{fields[0]}:{symbol}:{_PLACES[pos]}:{offset}:{ends}"
                yield id, own[max(0, first - 1)], relation, target[max(0, second - 1)]
        except (ValueError, IndexError, KeyError):
            raise _broken(path, number, fields) from None


def _lines(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """(line number, fields, gloss); the licence in front begins with two spaces."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.startswith("  "):
                head, _, gloss = line.partition("|")
                yield number, head.split(), gloss.strip()


def _plain(word: str) -> str:
    """Without the marker of an adjective's place, such as `(p)`, and with spaces."""
    return word.partition("(")[0].replace("_", " ")


def _broken(path: Path, number: int, fields: list[str]) -> DataError:
    return DataError(f"{path}: line {number}: not in WordNet's format (wndb(5WN)): {' '.join(fields)[:80]!r}")
