"""A hundred thousand entries: built, asked, edited and removed from, while others read."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")

from made_stores import brute_force, found_rows, said, text_store, unit_vectors

from mmctx.store.store import Store

COUNT, DIM = 100_000, 64
READER = """
import sys
import time
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
from made_stores import unit_vectors
from mmctx.store.store import Store
store, queries, turns = Store.open(sys.argv[1]), unit_vectors(20, 64, seed=7, rank=16), 0
print("reading", flush=True)
while not Path(sys.argv[1], "..", "stop").exists():
    for exact in (True, False):
        for hits in store.search(queries, 10, exact=exact):
            assert len({hit.id for hit in hits}) == len({hit.version for hit in hits}) * 10 == 10, hits
            assert all(hit.text in (f"text {hit.id[1:]}", "changed") for hit in hits)
    turns += 1
    time.sleep(0.1)
print(turns, flush=True)
"""


def recall_at_10(near: list[list[int]], best: list[list[int]]) -> float:
    return float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(near, best, strict=True)]))


@pytest.mark.slow
def test_a_hundred_thousand(fast_dir: Path) -> None:
    vectors, queries = unit_vectors(COUNT, DIM, rank=16), unit_vectors(100, DIM, seed=7, rank=16)
    store = text_store(fast_dir / "store", vectors)
    assert len(store) == COUNT
    started = time.perf_counter()
    about = store.build_index()
    assert (about["vectors"], about["recall"] >= 0.97) == (COUNT, True)
    print(f"index made and measured in {time.perf_counter() - started:.1f} s: {about}")
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(store.path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert all(reader.stdout and reader.stdout.readline() == "reading\n" for reader in readers)
    best = brute_force(queries, vectors, 10)
    assert found_rows(store, queries, 10, exact=True) == best
    assert recall_at_10(found_rows(store, queries, 10), best) >= 0.95

    # Every nearest entry of half of the queries goes; others take another place; a thousand are new.
    gone = sorted({row for found in best[:50] for row in found})
    assert store.remove([f"d{row}" for row in gone]) == len(gone)
    moved = [row for row in range(0, COUNT, 101) if row not in gone]
    fresh = unit_vectors(len(moved) + 1000, DIM, seed=11, rank=16)
    vectors = np.concatenate([vectors, fresh[len(moved) :]])
    vectors[moved] = fresh[: len(moved)]
    store.write([said(row, "changed") for row in moved], [[vectors[row]] for row in moved])
    store.write(
        [said(row) for row in range(COUNT, COUNT + 1000)], [[vectors[row]] for row in range(COUNT, COUNT + 1000)]
    )
    among = np.setdiff1d(np.arange(COUNT + 1000), gone)
    for turn in range(2):  # through the old index, and once it was brought up to date
        best = brute_force(queries, vectors, 10, among)
        assert found_rows(store, queries, 10, exact=True) == best
        near = found_rows(store, queries, 10)
        assert recall_at_10(near, best) >= 0.95, turn
        assert not {row for found in near for row in found} & {*gone}
        store.tidy()
    (fast_dir / "stop").touch()
    for reader in readers:
        turns, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert int(turns) >= 2
    assert len(Store.open(store.path)) == COUNT + 1000 - len(gone)
