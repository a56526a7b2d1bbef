"""The store itself: a folder with one LanceDB table, which readers search while one writer changes it.

Every change is one commit, a new version of the table (LanceDB writes new files and then one manifest, by a rename), so a process that is
killed at any instant leaves the version before or the version after. Readers see the newest version at each call, and never half a change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.errors import DataError
from mmctx.store import table as rows_module
from mmctx.store.entries import Document, Hit, Kind
from mmctx.store.index import Index
from mmctx.store.lock import writing
from mmctx.store.provenance import Provenance
from mmctx.store.table import COLUMNS, TABLE, any_of, documents_of, lancedb, quoted, rows

_FOUND = ["id", "part", "kind", "text", "source", "shown", "_distance"]
_AT_ONCE = 1000
"""Ids in one condition of a look-up."""


class Store:
    """A knowledge store. Open it by `Store.open`, make one by `Store.create`.

    A handle belongs to one thread, and to the process that opened it: LanceDB's threads do not survive a fork.

    Attributes:
        path: its folder.
        provenance: the encoder that made its vectors.
    """

    def __init__(self, path: Path, *, pinned: bool = False, timeout: float = 60.0) -> None:
        self.path, self.timeout, self._pinned = path, timeout, pinned
        try:
            if not path.is_dir():  # LanceDB would make it
                raise FileNotFoundError
            self._table = lancedb().connect(str(path)).open_table(TABLE)
        except (ValueError, FileNotFoundError):
            raise DataError(
                f"{path}: holds no knowledge store; make one by `mmctx memory build {path} INPUTS`"
            ) from None
        self.provenance = Provenance.of(self._table.schema.metadata, path)
        if pinned:
            self._table.checkout(self._table.version)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """A store that exists.

        Raises:
            DataError: there is none, or another program made it.
        """
        return cls(Path(path))

    @classmethod
    def create(cls, path: str | Path, provenance: Provenance) -> Store:
        """A new, empty store.

        Raises:
            DataError: there is one already, or the folder holds other files.
        """
        path = Path(path)
        if path.is_dir() and any(entry.name not in (".lock", f"{TABLE}.lance") for entry in path.iterdir()):
            raise DataError(f"{path}: not empty; name a new folder")
        path.mkdir(parents=True, exist_ok=True)
        try:
            lancedb().connect(str(path)).create_table(TABLE, schema=rows_module.schema(provenance))
        except ValueError:
            raise DataError(f"{path}: there is a store already; use `mmctx memory add {path} INPUTS`") from None
        return cls(path)

    @property
    def version(self) -> int:
        """Number of the version that this handle reads; it grows with each change."""
        return self._fresh().version

    def snapshot(self) -> Store:
        """A handle that keeps to the present version, so that several calls see the same state."""
        return Store(self.path, pinned=True)

    def _fresh(self) -> Any:
        if not self._pinned:
            self._table.checkout_latest()
        return self._table

    def __len__(self) -> int:
        """Documents."""
        return self._fresh().count_rows("part = 0")

    def num_vectors(self) -> int:
        """Parts that have an embedding, and so can be found."""
        return self._fresh().count_rows("vector IS NOT NULL")

    def write(self, documents: Sequence[Document], vectors: Sequence[Sequence[np.ndarray | None]]) -> int:
        """Adds documents, and puts them in the place of those of the same id, in one commit.

        Args:
            documents: of different ids.
            vectors: see `table.rows`.

        Returns:
            The new version.

        Raises:
            DataError: two have one id, one has no part, or a vector does not fit.
        """
        if not documents:
            return self.version
        ids = [document.id for document in documents]
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise DataError(f"{self.path}: document {twice!r} comes twice in one change; give each its own id")
        if bare := [document.id for document in documents if not document.parts]:
            raise DataError(f"{self.path}: document {bare[0]!r} has no parts")
        new = rows(documents, vectors, self.provenance)
        with writing(self.path, self.timeout):
            change = self._fresh().merge_insert(["id", "part"]).when_matched_update_all().when_not_matched_insert_all()
            change = change.when_not_matched_by_source_delete(any_of("id", ids))  # a document may have become shorter
            change.execute(new, on_bad_vectors="null")  # the parts without one; the others were looked at
            return self.version

    def remove(self, ids: Sequence[str] = (), source: str | None = None) -> int:
        """Removes documents by id, or all of a source, in one commit; returns how many there were.

        From then on no search and no look-up finds them, through an index that is older, too. Their bytes stay in older versions of the
        files until `erase`.
        """
        conditions = [any_of("id", list(ids))] if ids else []
        conditions += [f"source = {quoted(source)}"] if source is not None else []
        if not conditions:
            return 0
        where = " OR ".join(conditions)
        with writing(self.path, self.timeout):
            count = self._fresh().count_rows(f"part = 0 AND ({where})")
            if count:
                self._table.delete(where)
            return count

    def erase(self) -> None:
        """Writes the store anew and deletes all older versions: what was removed leaves the disk, too.

        A reader that is in the middle of an older version fails, and finds the new one at its next call.
        """
        with writing(self.path, self.timeout):
            present = self._fresh().search().to_batches()
            connection = lancedb().connect(str(self.path))
            schema = rows_module.schema(self.provenance)
            self._table = connection.create_table(
                TABLE, present, schema=schema, mode="overwrite", on_bad_vectors="null"
            )
            self._index.forget()
            self._tidy(timedelta(0))

    def tidy(self, keep: timedelta = timedelta(hours=1)) -> None:
        """Joins small files, brings the index up to date and deletes versions older than `keep`."""
        with writing(self.path, self.timeout):
            self._fresh()
            self._tidy(keep)

    def _tidy(self, keep: timedelta) -> None:
        with warnings.catch_warnings():  # says what `erase` says
            warnings.filterwarnings("ignore", message=".*cleanup_older_than")
            self._table.optimize(cleanup_older_than=keep, delete_unverified=not keep)

    @property
    def _index(self) -> Index:
        return Index(self.path, self._table)

    def build_index(self, kind: str = "ivf", recall: float = 0.97) -> dict[str, Any]:
        """Makes the approximate index anew and measures it; see `index.Index.build`."""
        with writing(self.path, self.timeout):
            self._fresh()
            return self._index.build(kind, recall)

    def describe(self) -> dict[str, Any]:
        """What it is and holds, as plain values."""
        table = self._fresh()
        kinds = {kind: table.count_rows(f"kind = {quoted(kind)}") for kind in ("text", "image", "audio")}
        about = {"version": table.version, "documents": len(self), "parts": {k: n for k, n in kinds.items() if n}}
        made = {name: getattr(self.provenance, name) for name in ("encoder", "fingerprint", "dim", "normalisation")}
        return about | {"vectors": self.num_vectors(), **made, "index": self._index.about()}

    def search(
        self,
        queries: np.ndarray,
        k: int = 10,
        *,
        kinds: Sequence[Kind] = (),
        source: str | None = None,
        exact: bool = False,
    ) -> list[list[Hit]]:
        """The parts most similar to each query, most similar first.

        Args:
            queries: (n, E) unit vectors of the store's encoder.
            k: how many of each; fewer where the store holds fewer.
            kinds: only such parts; all by default.
            source: only of documents with this source.
            exact: compare with every part, as brute force does; otherwise through the index, if there is one and no source is named.

        Raises:
            DataError: the vectors have another length than the store's.
        """
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        if queries.shape[1] != self.provenance.dim:
            raise DataError(
                f"{self.path}: queries of {queries.shape[1]} numbers, its vectors have {self.provenance.dim} "
                f"(encoder {self.provenance.encoder!r}); embed them with its own encoder"
            )
        table = self._fresh()
        found: list[list[Hit]] = [[] for _ in queries]
        conditions = [any_of("kind", kinds)] if kinds else []
        conditions += [f"source = {quoted(source)}"] if source is not None else []
        request = table.search(list(queries)).distance_type("dot").select(_FOUND).limit(k)
        if conditions:
            request = request.where(" AND ".join(conditions), prefilter=True)
        exact = exact or source is not None  # one source may lie in clusters that few queries visit
        request = request.bypass_vector_index() if exact else self._index.tuned(request)
        for row in request.to_list():
            number = row.pop("query_index", 0)
            row["score"] = 1 - row.pop("_distance")
            found[number].append(Hit(**row, version=table.version))
        return [sorted(hits, key=lambda hit: (-hit.score, hit.id, hit.part)) for hits in found]

    def documents(self, ids: Sequence[str]) -> dict[str, Document]:
        """Documents by id, media included; those that are not there are left out."""
        table = self._fresh()
        found: dict[str, Document] = {}
        for chunk in _chunks(ids):
            mine = table.search().where(any_of("id", chunk)).select(list(COLUMNS)).to_list()
            found |= {document.id: document for document in documents_of(mine)}
        return found

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """`Document.digest` of those that are there."""
        table = self._fresh()
        found: dict[str, str] = {}
        for chunk in _chunks(ids):
            mine = table.search().where(f"part = 0 AND {any_of('id', chunk)}").select(["id", "digest"]).to_list()
            found |= {row["id"]: row["digest"] for row in mine}
        return found

    def vectors(self, column: str, values: Sequence[str]) -> Mapping[str, np.ndarray]:
        """For each value of a column (`id`, `shown`, `content`) the vectors (n, E) of the parts that have it, in order of id and part."""
        table = self._fresh()
        found: dict[str, list[tuple[str, int, Any]]] = {}
        for chunk in _chunks(values):
            where = f"vector IS NOT NULL AND {any_of(column, chunk)}"
            for row in table.search().where(where).select(["id", "part", "vector", *({column} - {"id"})]).to_list():
                found.setdefault(row[column], []).append((row["id"], row["part"], row["vector"]))
        return {
            value: np.array([vector for *_, vector in sorted(mine, key=lambda row: row[:2])], np.float32)
            for value, mine in found.items()
        }

    def sources(self) -> list[str]:
        """Inputs that its documents came from, sorted."""
        return sorted(set(self._fresh().search().where("part = 0").select(["source"]).to_arrow()["source"].to_pylist()))

    def ids(self) -> list[str]:
        """Of all documents, sorted."""
        return sorted(self._fresh().search().where("part = 0").select(["id"]).to_arrow()["id"].to_pylist())


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    values = list(dict.fromkeys(values))
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]
