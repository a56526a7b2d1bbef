"""Knowledge graphs as documents: each triple a row that says itself in words, with a picture of its subject where one is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote

from mmctx.datasets.build.members import LeftOut
from mmctx.errors import DataError
from mmctx.store.entries import Document, Part, Triple
from mmctx.store.read import media_bytes
from mmctx.store.wordnet import read_wordnet

Format = Literal["wordnet", "ntriples", "tsv"]
FORMATS: tuple[Format, ...] = ("wordnet", "ntriples", "tsv")

_STATEMENT = re.compile(
    r'\s*(<[^>]*>|_:\S+)\s+<([^>]*)>\s+(<[^>]*>|_:\S+|"(?:[^"\\]|\\.)*")(?:@[\w-]+|\^\^<[^>]*>)?\s*\.\s*(?:#.*)?'
)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_LETTERS = {"t": "\t", "b": "\b", "n": "\n", "r": "\r", "f": "\f"}


class Fact(NamedTuple):
    """A triple under the name that it has in a store, so that a change of it finds it again."""

    id: str
    triple: Triple


def read_graph(where: Path, format: Format) -> Iterator[Fact]:
    """The triples of a graph: WordNet's folder or one of its `data.*` files, N-Triples (W3C 2014), or a table of three columns, by tabs.

    Raises:
        DataError: there is no such file, or a line of it is no triple.
    """
    if not where.exists():
        hint = "; apt-get install wordnet-base puts it into /usr/share/wordnet" if format == "wordnet" else ""
        raise DataError(f"{where}: no such file or folder{hint}")
    if format == "wordnet":
        for id, *triple in read_wordnet(where):
            yield Fact(id, Triple(*triple))
        return
    parse = _statement if format == "ntriples" else _cells
    with where.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            triple = parse(line)
            if triple is None:
                wanted = (
                    "<subject> <relation> <object> ." if format == "ntriples" else "subject TAB relation TAB object"
                )
                raise DataError(f"{where}: line {number}: expected {wanted}, found {line.strip()[:80]!r}")
            yield Fact("|".join(triple), triple)


def _cells(line: str) -> Triple | None:
    cells = [cell.strip() for cell in line.rstrip("\n").split("\t")]
    return Triple(*cells) if len(cells) == 3 and all(cells) else None


def _statement(line: str) -> Triple | None:
    found = _STATEMENT.fullmatch(line.rstrip("\n"))
    return Triple(*map(_term, found.groups())) if found else None


def _term(term: str) -> str:
    """A node's name: of an IRI what follows the last `/` or `#`, of a literal its value."""
    if term.startswith('"'):
        return _unescaped(term[1:-1])
    iri = _unescaped(term.strip("<>"))
    return unquote(re.split(r"[/#]", iri.rstrip("/#"))[-1]) or iri


def _unescaped(text: str) -> str:
    def character(found: re.Match[str]) -> str:
        code = found.group(1) or found.group(2)
        return chr(int(code, 16)) if code else _LETTERS.get(found.group(3), found.group(3))

    return _ESCAPE.sub(character, text)


def verbalise(triple: Triple) -> str:
    """A triple in words: `dog is a kind of canine.`, `Ada Lovelace birth place London.`"""
    return f"{_words(triple.subject)} {_words(triple.relation).lower()} {_words(triple.object)}."


def _words(name: str) -> str:
    """Underscores and changes of case become spaces."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name.replace("_", " ")).strip()


def documents(
    facts: Iterable[Fact],
    source: str,
    pictures: Mapping[str, Part] | None = None,
    relations: Iterable[str] = (),
    prefix: str = "",
) -> Iterator[Document]:
    """A document for each triple: a picture of its subject, if there is one of that name, and the triple in words.

    Args:
        facts: as `read_graph` gives them.
        source: of the documents.
        pictures: by name, see `pictures_by_name`.
        relations: only these; all by default.
        prefix: what ids begin with.
    """
    wanted = {relation.casefold() for relation in relations}
    for id, triple in facts:
        if wanted and triple.relation.casefold() not in wanted:
            continue
        picture = (pictures or {}).get(_name(triple.subject))
        text = Part("text", verbalise(triple))
        yield Document(prefix + id, (picture, text) if picture else (text,), source=source, triple=triple)


def pictures_by_name(inputs: Iterable[Document | LeftOut]) -> dict[str, Part]:
    """Pictures by their captions: of documents of one picture and short texts, the first of each name."""
    found: dict[str, Part] = {}
    for document in inputs:
        if isinstance(document, LeftOut):
            continue
        media = [part for part in document.parts if part.kind == "image"]
        for part in document.parts:
            if part.kind == "text" and part.text and len(media) == 1:
                found.setdefault(_name(part.text), Part("image", media=media_bytes(media[0])))
    return found


def _name(text: str) -> str:
    return " ".join(_words(text).casefold().rstrip(".").split())
