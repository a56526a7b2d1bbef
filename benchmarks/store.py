"""The knowledge store: building it, and searching it exactly and through its index, against brute force in numpy.

    python benchmarks/store.py [--json] [--quick] [--repeats 5]

100,000 unit vectors of 256 numbers near a subspace of 32, as learned embeddings lie, each with a short text; 200 queries, one by one and
all at once, on one thread of numpy (LanceDB takes the threads that it wants). Exact answers of both sides are asserted equal first. Times
are given as ratios to brute force over a matrix in memory: what a store costs beyond it is files, versions and rows.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import interleaved, machine, parse, report, timed, versions

from mmctx.store.entries import Document, Part
from mmctx.store.provenance import Provenance
from mmctx.store.store import Store

TOP = 10
BARS = {"recall": 0.95}
"""R@10 of the index against exact search."""


def unit_vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """(count, dim) float32."""
    rng, basis = np.random.default_rng(seed), np.random.default_rng(99).standard_normal((32, dim))
    drawn = rng.standard_normal((count, 32)) @ basis + 0.3 * rng.standard_normal((count, dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def brute_force(queries: np.ndarray, vectors: np.ndarray) -> list[list[int]]:
    """Rows of the ten largest dot products, largest first."""
    scores = queries @ vectors.T
    part = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
    order = np.take_along_axis(scores, part, 1).argsort(axis=1)[:, ::-1]
    return np.take_along_axis(part, order, 1).tolist()


def found(store: Store, queries: np.ndarray, exact: bool) -> list[list[int]]:
    """The same of the store."""
    return [[int(hit.id) for hit in hits] for hits in store.search(queries, TOP, exact=exact)]


def recall(near: list[list[int]], best: list[list[int]]) -> float:
    """R@10."""
    return float(np.mean([len({*a} & {*b}) / TOP for a, b in zip(near, best, strict=True)]))


def build(folder: Path, vectors: np.ndarray, kind: str) -> tuple[Store, dict[str, Any]]:
    """A store of them, and the seconds that writing and indexing took."""
    store = Store.create(folder, Provenance("benchmark", "0" * 16, vectors.shape[1], ("text",)))
    started = time.perf_counter()
    for start in range(0, len(vectors), 10_000):
        some = range(start, min(start + 10_000, len(vectors)))
        documents = [Document(str(n), (Part("text", f"entry number {n}"),)) for n in some]
        store.write(documents, [[vectors[n]] for n in some])
    written = time.perf_counter()
    index = store.build_index(kind)
    seconds = {"write": round(written - started, 2), "index": round(time.perf_counter() - written, 2)}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return store, {"seconds": seconds, "mib": round(size / 2**20, 1), "index": index}


def main() -> None:
    arguments = parse(__doc__, repeats=5)
    count, dim, asked = (6_000, 32, 20) if arguments.quick else (100_000, 256, 200)
    vectors, queries = unit_vectors(count, dim, 0), unit_vectors(asked, dim, 1)
    folder = Path(tempfile.mkdtemp(prefix="mmctx-store-"))
    try:
        store, built = build(folder / "store", vectors, "ivf")
        best = brute_force(queries, vectors)
        assert found(store, queries, exact=True) == best, "exact search differs from brute force"
        share = recall(found(store, queries, exact=False), best)
        assert arguments.quick or share >= BARS["recall"], f"R@10 is {share}"
        few = queries[:20]
        sides = {
            "numpy": lambda: [brute_force(query[None], vectors) for query in few],
            "exact": lambda: [found(store, query[None], exact=True) for query in few],
            "index": lambda: [found(store, query[None], exact=False) for query in few],
            "numpy at once": lambda: brute_force(queries, vectors),
            "exact at once": lambda: found(store, queries, exact=True),
            "index at once": lambda: found(store, queries, exact=False),
        }
        times = interleaved({name: timed(side) for name, side in sides.items()}, arguments.repeats)
    finally:
        shutil.rmtree(folder)
    each = {name: min(seconds) / (asked if "at once" in name else len(few)) for name, seconds in times.items()}
    over = {name: round(each[name] / each["numpy" + name[5:]], 2) for name in each if not name.startswith("numpy")}
    result = {
        "entries": count,
        "built": built,
        "recall_at_10": round(share, 4),
        "milliseconds_a_query": {name: round(1000 * seconds, 3) for name, seconds in each.items()},
        "times_brute_force": over,
        "bars": BARS,
        "machine": machine(),
        "versions": versions("lancedb", "numpy", "mmctx"),
    }
    lines = [
        f"{count:,} entries of {dim} numbers: {built['seconds']} s, {built['mib']} MiB, {built['index']}",
        f"R@10 {share:.4f} (bar {BARS['recall']})",
        f"ms a query {result['milliseconds_a_query']}",
        f"time over brute force {over}",
    ]
    report(result, lines, arguments.json)


if __name__ == "__main__":
    main()
