"""The rows of a store: one a part, in a LanceDB table. How documents become rows, and rows documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from types import ModuleType
from typing import Any

import numpy as np

from mmctx.errors import DataError, MmctxError
from mmctx.store.entries import Document, Part, Triple
from mmctx.store.provenance import Provenance

TABLE = "entries"
COLUMNS = ("id", "part", "kind", "text", "media", "path", "subject", "relation", "object", "facts", "source", "content")
"""All but `shown`, `digest` and `vector`: what a document is made of again."""


def lancedb() -> ModuleType:
    """Raises `MmctxError` with the remedy where LanceDB is not installed."""
    try:
        import lancedb

        return lancedb
    except ImportError:
        raise MmctxError("a knowledge store needs the package lancedb: pip install 'mmctx[memory]'") from None


def schema(provenance: Provenance) -> Any:
    """Arrow schema of the table. A part that the encoder cannot embed has no vector: it is kept and shown, but not found by itself."""
    import pyarrow as pa

    texts = ("kind", "text", "path", "subject", "relation", "object", "facts", "source", "content", "shown", "digest")
    fields = [pa.field("id", pa.string()), pa.field("part", pa.int32())]
    fields += [pa.field(name, pa.string()) for name in texts]
    fields += [pa.field("media", pa.large_binary()), pa.field("vector", pa.list_(pa.float32(), provenance.dim))]
    return pa.schema(fields, metadata=provenance.metadata())


def rows(documents: Sequence[Document], vectors: Sequence[Sequence[np.ndarray | None]], provenance: Provenance) -> Any:
    """Arrow table of some documents.

    Args:
        documents: of different ids.
        vectors: for each part of each document its embedding (E,), None where it has none.
        provenance: of the store.

    Raises:
        DataError: a vector has another length than the store's, is not finite, or is not of unit length.
    """
    import pyarrow as pa

    found: list[dict[str, Any]] = []
    matrix: list[np.ndarray | None] = []
    for document, embedded in zip(documents, vectors, strict=True):
        triple = document.triple or Triple(None, None, None)  # type: ignore[arg-type]
        common = {"id": document.id, "source": document.source, "digest": document.digest, "shown": document.shown}
        common |= {"facts": json.dumps(document.facts, default=str), **triple._asdict()}
        for number, (part, vector) in enumerate(zip(document.parts, embedded, strict=True)):
            own = {"part": number, "kind": part.kind, "text": part.text, "path": part.path, "content": part.content}
            own["media"] = None if part.path is not None else part.media
            found.append(common | own)
            matrix.append(_checked(vector, document.id, provenance))
    wanted = schema(provenance)
    nothing = np.zeros(provenance.dim, np.float32)
    values = np.concatenate([nothing if vector is None else vector for vector in matrix])
    missing = pa.array([vector is None for vector in matrix])
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), provenance.dim, mask=missing)
    plain = pa.Table.from_pylist(found, schema=wanted.remove(wanted.get_field_index("vector")))
    return plain.append_column(wanted.field("vector"), column)


def _checked(vector: np.ndarray | None, id: str, provenance: Provenance) -> np.ndarray | None:
    if vector is None:
        return None
    if vector.shape != (provenance.dim,):
        raise DataError(f"document {id!r}: a vector of shape {vector.shape}, the store's have {provenance.dim} numbers")
    norm = float(np.linalg.norm(vector))
    if not abs(norm - 1) < 1e-3:  # NaN fails, too
        raise DataError(
            f"document {id!r}: a vector of length {norm:.4g}, those of a store have length 1 ({provenance.normalisation})"
        )
    return np.asarray(vector, np.float32)


def documents_of(found: Iterable[dict[str, Any]]) -> list[Document]:
    """Documents from their rows, in any order; sorted by id."""
    ordered = sorted(found, key=lambda row: (row["id"], row["part"]))
    documents = []
    for id, group in groupby(ordered, key=lambda row: row["id"]):
        mine = list(group)
        parts = tuple(Part(*(row[name] for name in ("kind", "text", "media", "path", "content"))) for row in mine)
        first = mine[0]
        triple = None if first["subject"] is None else Triple(first["subject"], first["relation"], first["object"])
        documents.append(Document(id, parts, json.loads(first["facts"]), first["source"], triple))
    return documents


def quoted(value: str) -> str:
    """A string as SQL has it."""
    return "'" + value.replace("'", "''") + "'"


def any_of(column: str, values: Sequence[str]) -> str:
    """An SQL condition: the column holds one of `values`."""
    return f"{column} IN ({', '.join(map(quoted, values))})"
