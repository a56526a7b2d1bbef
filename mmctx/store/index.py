"""Approximate search: an index whose recall is measured on the store's own vectors, and raised until it is enough.

`ivf` keeps the vectors as they are, in about sqrt(n) clusters (k-means), and compares a query with those of the nearest clusters (Sivic &
Zisserman 2003; Jegou et al. 2011, without its compression). `hnsw` walks a graph inside larger clusters (Malkov & Yashunin 2016), over
vectors of 8 bits whose best are compared again in full: slower to make. What was added since is searched exactly, what was removed is
masked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.errors import ConfigError
from mmctx.store.entries import KINDS
from mmctx.store.table import quoted

FILE = "index.json"
SMALLEST = 5_000
"""Below so many vectors exact search takes milliseconds, and clusters would be too few."""
_QUERIES = 200
_TOP = 10


class Index:
    """The index of a table, as one handle on it sees it.

    Args:
        folder: of the store; a small file there says how many clusters a search must visit.
        table: LanceDB's.
    """

    def __init__(self, folder: Path, table: Any) -> None:
        self._file, self._table = folder / FILE, table

    def about(self) -> dict[str, Any]:
        """`kind`, `vectors` it was made over, `probes`, measured `recall` at 10; {} where there is none."""
        with suppress(OSError, ValueError):
            return json.loads(self._file.read_text(encoding="utf-8"))
        return {}

    def tuned(self, request: Any) -> Any:
        """A LanceDB query that visits as many clusters as were found to be enough; an exact one where that was not measured."""
        about = self.about()
        return _tuned(request, about["kind"], about["probes"]) if about else request.bypass_vector_index()

    def forget(self) -> None:
        """Search exactly from now on: while an index is made anew, or because the rows were written anew."""
        self._file.unlink(missing_ok=True)

    def build(self, kind: str, wanted: float) -> dict[str, Any]:
        """Makes it anew over all vectors, and visits half as many clusters again until R@10 reaches `wanted`, or all are visited.

        Recall is the share of the ten parts nearest to a query that the index finds. Queries are 200 stored parts, left out of their own
        answers; to half of them noise of their own length is added, for queries that are like nothing stored. Where there are several
        kinds, each is searched for by itself, too, by queries of all kinds, and the worst recall counts: pictures lie apart from texts.

        Returns:
            As `about`; {} for a store of fewer than `SMALLEST` vectors.

        Raises:
            ConfigError: there is no such kind.
        """
        if kind not in ("ivf", "hnsw"):
            raise ConfigError(f"an index is ivf or hnsw, not {kind!r}")
        count = self._table.count_rows("vector IS NOT NULL")
        if count < SMALLEST:
            self.forget()
            return {}
        from lancedb.index import IvfFlat, IvfHnswSq

        self.forget()
        partitions = max(1, round(count**0.5)) if kind == "ivf" else max(1, count // 50_000)
        config = (IvfFlat if kind == "ivf" else IvfHnswSq)(distance_type="dot", num_partitions=partitions)
        self._table.create_index("vector", config=config, replace=True)
        self._table.checkout_latest()
        names, queries = self._sample(count)
        best = self._near(names, queries, lambda request: request.bypass_vector_index())
        probes = max(1, partitions // 32)
        while True:
            found = self._near(names, queries, lambda request, n=probes: _tuned(request, kind, n))
            recall = min(_recall(*pair) for pair in zip(found, best, strict=True))
            if recall >= wanted or probes == partitions:
                break
            probes = min(probes + probes // 2 + 1, partitions)
        about = {"kind": kind, "vectors": count, "clusters": partitions, "probes": probes, "recall": round(recall, 4)}
        fresh = self._file.with_name(f".{FILE}.{os.getpid()}")
        fresh.write_text(json.dumps(about), encoding="utf-8")
        os.replace(fresh, self._file)
        return about

    def _sample(self, count: int) -> tuple[list[tuple[str, int]], np.ndarray]:
        """(id, part) of some parts, spread evenly over the table, and queries (n, E) made of them."""
        step = max(1, count // _QUERIES)
        names: list[tuple[str, int]] = []
        vectors: list[np.ndarray] = []
        request = self._table.search().where("vector IS NOT NULL").select(["id", "part", "vector"])
        seen = 0
        for batch in request.to_batches():
            some = batch.take(list(range(-seen % step, len(batch), step)))
            seen += len(batch)
            names += zip(some["id"].to_pylist(), some["part"].to_pylist(), strict=True)
            vectors += [np.array(vector, np.float32) for vector in some["vector"].to_pylist()]
        queries = np.stack(vectors)
        noise = np.random.default_rng(0).standard_normal(queries[1::2].shape).astype(np.float32)
        queries[1::2] += noise / np.linalg.norm(noise, axis=1, keepdims=True)
        return names, queries / np.linalg.norm(queries, axis=1, keepdims=True)

    def _near(
        self, names: list[tuple[str, int]], queries: np.ndarray, tune: Callable[[Any], Any]
    ) -> list[list[set[tuple[str, int]]]]:
        """The ten parts nearest to each query beside the one that it was made of: among all, and among each of several kinds."""
        filters = [f"kind = {quoted(kind)}" for kind in KINDS]
        filters = [where for where in filters if self._table.count_rows(f"vector IS NOT NULL AND {where}")]
        found = []
        for where in [None, *(filters if len(filters) > 1 else [])]:
            request = tune(self._table.search(list(queries))).distance_type("dot")
            request = request.where(where, prefilter=True) if where else request
            near: list[list[tuple[float, tuple[str, int]]]] = [[] for _ in names]
            for row in request.select(["id", "part", "_distance"]).limit(_TOP + 1).to_list():
                near[row["query_index"]].append((row["_distance"], (row["id"], row["part"])))
            found.append(
                [
                    {name for _, name in [entry for entry in sorted(mine) if entry[1] != own][:_TOP]}
                    for mine, own in zip(near, names, strict=True)
                ]
            )
        return found


def _recall(found: list[set[tuple[str, int]]], best: list[set[tuple[str, int]]]) -> float:
    return float(np.mean([len(a & b) / max(1, len(b)) for a, b in zip(found, best, strict=True)]))


def _tuned(request: Any, kind: str, probes: int) -> Any:
    request = request.nprobes(probes)
    return request.ef(200).refine_factor(4) if kind == "hnsw" else request
