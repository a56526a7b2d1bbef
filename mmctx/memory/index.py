"""Approximate search: an index whose recall is measured on the store's own vectors, and raised until it is enough.

`ivf` keeps the vectors as they are, in about sqrt(n) clusters (k-means), and compares a query with those of the nearest clusters (Sivic &
Zisserman 2003; Jegou et al. 2011, without its compression). `hnsw` walks a graph inside larger clusters (Malkov & Yashunin 2016), over
vectors of 8 bits whose best are compared again in full: slower to make. What was added since is searched exactly, what was removed is
masked.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.errors import ConfigError

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
        """Makes it anew over all vectors, and doubles the clusters to visit until R@10 reaches `wanted`, or all are visited.

        Recall is the share of the ten parts nearest to a stored part, itself left out, that the index finds, over 200 parts in turn.

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
        ids, queries = self._sample(count)
        best = self._near(self._table.search(list(queries)).bypass_vector_index(), ids)
        probes = max(1, partitions // 32)
        while True:
            found = self._near(_tuned(self._table.search(list(queries)), kind, probes), ids)
            recall = float(np.mean([len(a & b) / max(1, len(b)) for a, b in zip(found, best, strict=True)]))
            if recall >= wanted or probes == partitions:
                break
            probes = min(2 * probes, partitions)
        about = {"kind": kind, "vectors": count, "clusters": partitions, "probes": probes, "recall": round(recall, 4)}
        fresh = self._file.with_name(f".{FILE}.{os.getpid()}")
        fresh.write_text(json.dumps(about), encoding="utf-8")
        os.replace(fresh, self._file)
        return about

    def _sample(self, count: int) -> tuple[list[tuple[str, int]], np.ndarray]:
        """(id, part) and vectors (n, E) of some parts, spread evenly over the table."""
        step = max(1, count // _QUERIES)
        taken: list[tuple[str, int]] = []
        vectors: list[np.ndarray] = []
        request = self._table.search().where("vector IS NOT NULL").select(["id", "part", "vector"])
        seen = 0
        for batch in request.to_batches():
            local = np.arange(-seen % step, len(batch), step)
            seen += len(batch)
            some = batch.take(local.tolist())
            taken += zip(some["id"].to_pylist(), some["part"].to_pylist(), strict=True)
            vectors += [np.array(vector, np.float32) for vector in some["vector"].to_pylist()]
        return taken, np.stack(vectors)

    def _near(self, request: Any, ids: list[tuple[str, int]]) -> list[set[tuple[str, int]]]:
        """The ten parts that each query found beside itself."""
        table = request.distance_type("dot").select(["id", "part", "_distance"]).limit(_TOP + 1).to_list()
        found: list[list[tuple[float, tuple[str, int]]]] = [[] for _ in ids]
        for row in table:
            found[row["query_index"]].append((row["_distance"], (row["id"], row["part"])))
        return [
            {name for _, name in [near for near in sorted(mine) if near[1] != own][:_TOP]}
            for mine, own in zip(found, ids, strict=True)
        ]


def _tuned(request: Any, kind: str, probes: int) -> Any:
    request = request.nprobes(probes)
    return request.ef(200).refine_factor(4) if kind == "hnsw" else request
