"""What a store knows of a question: entries to cite, and a prompt that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmctx.errors import ConfigError
from mmctx.store.encoders.base import Encoder
from mmctx.store.entries import Document, Kind
from mmctx.store.read import media_bytes
from mmctx.store.store import Store

Segment = tuple[Kind, str | bytes]
"""A text, or the bytes of a picture or clip."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A document that an answer rests on.

    Attributes:
        number: of the citation, from 1, as `[1]` in the prompt.
        document: all of it, media included.
        score: cosine similarity of the query with its most similar part.
        version: of the store when it was found.
    """

    number: int
    document: Document
    score: float
    version: int

    def plain(self) -> dict[str, Any]:
        """As JSON has it, media by kind."""
        document = self.document
        parts = [part.text if part.kind == "text" else f"<{part.kind}>" for part in document.parts]
        about = {"number": self.number, "id": document.id, "score": round(self.score, 4), "version": self.version}
        about |= {"source": document.source, "parts": parts, "facts": dict(document.facts)}
        return about | ({"triple": list(document.triple)} if document.triple else {})


@dataclass(frozen=True, slots=True)
class Recall:
    """What was found for one query.

    Attributes:
        citations: most similar first.
        segments: texts and media of the cited documents in the order of `order`, the query last.
    """

    citations: tuple[Citation, ...]
    segments: tuple[Segment, ...]


def embed_query(store: Store, encoder: Encoder, kind: Kind, value: str | bytes) -> np.ndarray:
    """(E,) of a text, or of the bytes of a picture or clip.

    Raises:
        DataError: the store was made by another encoder.
        ConfigError: the encoder cannot embed this kind.
        SampleError: it cannot be decoded.
    """
    store.provenance.check(encoder.provenance, store.path)
    if kind not in encoder.provenance.kinds:
        known = ", ".join(encoder.provenance.kinds)
        raise ConfigError(f"{encoder.provenance.encoder}: embeds {known}, not {kind}; ask by one of those")
    return encoder.embed([encoder.prepare(kind, value)])[0]


def recall(
    store: Store,
    encoder: Encoder,
    query: Sequence[Segment],
    k: int = 3,
    *,
    exact: bool = False,
    numbered: bool = True,
) -> Recall:
    """The k documents most similar to a query, and a prompt of them with the query behind.

    The search and the documents come from one version of the store, the newest: what was removed before the call is not cited. The most
    similar document stands last, next to the query.

    Args:
        store: to ask.
        encoder: the store's own.
        query: texts and media; each that the encoder knows asks, and a document counts by its best match.
        k: documents at most.
        exact: see `Store.search`.
        numbered: begin each document with its number, such as `[1] `.

    Raises:
        DataError: the store was made by another encoder.
        ConfigError: the encoder embeds nothing of the query.
    """
    asking: list[Segment] = [(kind, value) for kind, value in query if kind in encoder.provenance.kinds]
    if not asking:
        kinds = ", ".join(sorted({kind for kind, _ in query}))
        raise ConfigError(
            f"{encoder.provenance.encoder}: embeds {', '.join(encoder.provenance.kinds)}, the query holds {kinds or 'nothing'}"
        )
    vectors = np.stack([embed_query(store, encoder, kind, value) for kind, value in asking])
    citations = cite(store.snapshot(), vectors, k, exact=exact)
    segments: list[Segment] = []
    for citation in reversed(citations):
        if numbered:
            segments.append(("text", f"[{citation.number}] "))
        segments += [*segments_of(citation.document), ("text", "\n")]
    return Recall(tuple(citations), (*segments, *query))


def cite(snapshot: Store, vectors: np.ndarray, k: int, *, exact: bool = False) -> list[Citation]:
    """The k documents whose parts are most similar to any of the vectors (n, E), in a store that stands still."""
    best: dict[str, float] = {}
    wanted = k
    while True:  # several parts of one document may be near: ask for more until there are k documents, or no more parts
        best.clear()
        found = snapshot.search(vectors, wanted, exact=exact)
        for hit in (hit for hits in found for hit in hits):
            best[hit.id] = max(hit.score, best.get(hit.id, -1.0))
        if len(best) >= k or all(len(hits) < wanted for hits in found):
            break
        wanted *= 4
    ranked = sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
    documents = snapshot.documents([id for id, _ in ranked])
    return [Citation(number, documents[id], score, snapshot.version) for number, (id, score) in enumerate(ranked, 1)]


def segments_of(document: Document) -> list[Segment]:
    """Its parts in reading order, with media that are kept by path read from there."""
    return [(part.kind, (part.text or "") if part.kind == "text" else media_bytes(part)) for part in document.parts]
