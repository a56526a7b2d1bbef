"""Documents into a store: embedded in batches, committed in chunks, left alone where nothing changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from mmctx.datasets.build.members import LeftOut
from mmctx.errors import SampleError
from mmctx.store.encoders.base import Encoder
from mmctx.store.entries import Document
from mmctx.store.store import Store

CHUNK = 512
"""Documents of one commit: what a kill can lose at most is encoded again."""
Thing = TypeVar("Thing")


@dataclass
class Added:
    """What became of some documents.

    Attributes:
        added: were not in the store.
        updated: were there with other contents.
        unchanged: were there as they are.
        left_out: could not be used.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    left_out: list[LeftOut] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts; what was left out by reason."""
        reasons = dict(Counter(entry.reason for entry in self.left_out))
        return {"added": self.added, "updated": self.updated, "unchanged": self.unchanged, "left_out": reasons}


def ingest(
    store: Store,
    encoder: Encoder,
    documents: Iterable[Document | LeftOut],
    progress: Callable[[int], None] | None = None,
    seen: set[str] | None = None,
) -> Added:
    """Adds documents, and puts them in the place of those of the same id that differ.

    Each chunk is one commit. Killed and called again, it goes on where it was: what is in the store as it is needs no encoder.

    Args:
        store: of this encoder.
        encoder: embeds the parts of kinds that it knows; others are kept and not found by themselves.
        documents: their ids should differ; a second one is left out.
        progress: called with the number of documents read so far.
        seen: ids that came before, in other calls for the same change; gets those of these documents.

    Raises:
        DataError: the store was made by another encoder.
    """
    store.provenance.check(encoder.provenance, store.path)
    result, count = Added(), 0
    seen = set() if seen is None else seen
    for chunk in chunks(documents, CHUNK):
        fresh: dict[str, Document] = {}
        for entry in chunk:
            if isinstance(entry, LeftOut):
                result.left_out.append(entry)
            elif entry.id in seen:
                result.left_out.append(
                    LeftOut(entry.id, "duplicate_key", "an earlier one has the same id; tell inputs apart by --prefix")
                )
            else:
                fresh[entry.id] = entry
                seen.add(entry.id)
        known = store.digests(list(fresh))
        changed = [document for document in fresh.values() if known.get(document.id) != document.digest]
        result.unchanged += len(fresh) - len(changed)
        usable, vectors, broken = embed_documents(encoder, changed)
        result.left_out += broken
        if usable:
            store.write(usable, vectors)
        updated = sum(document.id in known for document in usable)
        result.added, result.updated = result.added + len(usable) - updated, result.updated + updated
        count += len(chunk)
        if progress is not None:
            progress(count)
    return result


def embed_documents(
    encoder: Encoder, documents: Sequence[Document]
) -> tuple[list[Document], list[list[np.ndarray | None]], list[LeftOut]]:
    """The documents whose parts can all be decoded, the vectors of their parts, and the others with reasons."""
    prepared: list[Any] = []
    places: list[list[int | None]] = []
    usable: list[Document] = []
    broken: list[LeftOut] = []
    for document in documents:
        mine: list[int | None] = []
        start = len(prepared)
        try:
            for part in document.parts:
                value = part.text if part.kind == "text" else part.media
                if part.kind in encoder.provenance.kinds and value is not None:
                    prepared.append(encoder.prepare(part.kind, value))
                    mine.append(len(prepared) - 1)
                else:
                    mine.append(None)
        except SampleError as error:
            del prepared[start:]
            broken.append(LeftOut(document.id, error.reason, error.detail))
            continue
        if all(place is None for place in mine):
            detail = f"has none of what the encoder embeds: {', '.join(encoder.provenance.kinds)}"
            broken.append(LeftOut(document.id, "no_vector", detail))
            continue
        usable.append(document)
        places.append(mine)
    embedded = encoder.embed(prepared) if prepared else np.zeros((0, encoder.provenance.dim), np.float32)
    vectors = [[None if place is None else embedded[place] for place in mine] for mine in places]
    return usable, vectors, broken


def chunks(things: Iterable[Thing], size: int) -> Iterator[list[Thing]]:
    """Lists of up to `size`."""
    found: list[Thing] = []
    for thing in things:
        found.append(thing)
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found
