"""A process that writes to a store, or reads from it, until it is killed.

    python tests/store/store_worker.py write STORE SEED
    python tests/store/store_worker.py read STORE

A generation is `SIZE` documents that come and go together, in one commit each; all say their generation and how often it was written. The
writer prints a line before and one after each commit: what it printed after must last, whatever happens. The reader prints a line for each
version that it saw, and stops at the first half of a change.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from mmctx.store.entries import Document, Part
from mmctx.store.store import Store

SIZE, GENERATIONS, DIM = 25, 8, 16


def documents(generation: int, turn: int) -> list[Document]:
    return [Document(f"g{generation}-{n}", (Part("text", f"{generation} {turn}"),)) for n in range(SIZE)]


def vector(generation: int, turn: int, number: int) -> np.ndarray:
    drawn = np.random.default_rng([generation, turn, number]).standard_normal(DIM)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def state_of(store: Store) -> dict[int, int]:
    """Generation -> turn of each that is there; every one must be whole."""
    still = store.snapshot()
    found = still.documents(still.ids())
    said = Counter(tuple(map(int, (document.parts[0].text or "").split())) for document in found.values())
    torn = {pair: count for pair, count in said.items() if count != SIZE}
    assert not torn, f"version {still.version}: parts of a change: {torn}"
    assert len({generation for generation, _ in said}) == len(said), (
        f"version {still.version}: a generation twice: {said}"
    )
    return dict(said.keys())  # type: ignore[arg-type]


def write(path: Path, seed: int) -> None:
    store, rng = Store.open(path), random.Random(seed)
    turn = seed * 1_000_000
    while True:
        turn += 1
        generation = rng.randrange(GENERATIONS)
        gone = rng.random() < 0.3
        print("trying", generation, "none" if gone else turn, flush=True)
        if gone:
            store.remove([document.id for document in documents(generation, turn)])
        else:
            store.write(documents(generation, turn), [[vector(generation, turn, n)] for n in range(SIZE)])
        print("done", generation, "none" if gone else turn, flush=True)
        if rng.random() < 0.1:
            store.tidy()


def read(path: Path) -> None:
    store, last = Store.open(path), 0
    parent = os.getppid()
    while os.getppid() == parent:
        version = store.version
        assert version >= last, f"version {version} after {last}"
        state = state_of(store)
        for (
            generation,
            turn,
        ) in state.items():  # who reads in the middle of a change finds the old or the new, never half of it
            hits = store.search(vector(generation, turn, 0), 1, exact=True)[0]
            assert not hits or abs(hits[0].score) <= 1.0001
        if version > last:
            print(version, flush=True)
        last = version
        time.sleep(0.05)  # the writer needs the processor, too


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        read(Path(sys.argv[2]))
