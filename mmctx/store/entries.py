"""What a store holds: documents, and their parts, which are embedded one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "image", "audio"]
KINDS: tuple[Kind, ...] = ("text", "image", "audio")


@dataclass(frozen=True, slots=True)
class Part:
    """A text, picture or clip of a document.

    Attributes:
        kind: what it is.
        text: of a text.
        media: bytes of a picture or clip, as a shard holds them.
        path: where they lie, if the store is not to keep the bytes: `SHARD#KEY.EXTENSION`.
        named: `content`, where it is known without the bytes.
    """

    kind: Kind
    text: str | None = None
    media: bytes | None = None
    path: str | None = None
    named: str = ""

    @property
    def content(self) -> str:
        """16 hexadecimal digits that name what it shows, wherever it lies."""
        if self.named:
            return self.named
        shown = self.media if self.text is None else self.text.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(self.kind.encode() + b"\0" + (shown or b""), digest_size=8).hexdigest()


class Triple(NamedTuple):
    """A fact of a knowledge graph."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True, slots=True)
class Document:
    """What is added, changed, removed and cited as a whole.

    Attributes:
        id: its name in the store.
        parts: in reading order.
        facts: metadata, plain JSON values.
        source: where it comes from; removals and searches may name it.
        triple: the fact that it says, if it comes from a knowledge graph.
    """

    id: str
    parts: tuple[Part, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    triple: Triple | None = None

    @property
    def shown(self) -> str:
        """Names what it shows: equal for exact duplicates, whatever their names, sources and metadata."""
        return _digest([part.content for part in self.parts])

    @property
    def digest(self) -> str:
        """Names all of it: a document is written again only if this changed."""
        where = [part.path for part in self.parts]
        return _digest([self.shown, where, self.facts, self.source, list(self.triple or ())])


@dataclass(frozen=True, slots=True)
class Hit:
    """A part that a search found.

    Attributes:
        id: of its document.
        part: its place there, from 0.
        kind: of the part.
        text: of a text; None of media, which `Store.documents` has.
        score: cosine similarity with the query.
        source: of the document.
        shown: names what the whole document shows, see `Document.shown`.
        version: of the store that was searched.
    """

    id: str
    part: int
    kind: Kind
    text: str | None
    score: float
    source: str
    shown: str
    version: int


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
