"""Writers that are killed in the middle, with readers beside them: real processes, real SIGKILL."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")

import store_worker

from mmctx.store.provenance import Provenance
from mmctx.store.store import Store

WORKER = str(Path(__file__).with_name("store_worker.py"))
KILLS = 4


def start(*arguments: str, out: Path) -> subprocess.Popen[bytes]:
    with out.open("ab") as file:
        return subprocess.Popen([sys.executable, WORKER, *arguments], stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_committed(fast_dir: Path) -> None:
    path = fast_dir / "store"
    store = Store.create(path, Provenance("made", "0123456789abcdef", store_worker.DIM, ("text",)))
    readers = [start("read", str(path), out=fast_dir / f"reader{n}.txt") for n in range(2)]
    state: dict[int, int] = {}
    rng = random.Random(0)
    in_the_middle = commits = 0
    for kill in range(KILLS):
        log = fast_dir / f"writer{kill}.txt"
        writer = start("write", str(path), str(kill), out=log)
        while not (log.exists() and log.read_text().count("done") >= 3):
            assert writer.poll() is None, log.read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if kill % 2:  # while a commit is under way, for sure
            while not log.read_text().rstrip("\n").rpartition("\n")[2].startswith("trying"):
                time.sleep(0.0005)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        lines = [line.split() for line in log.read_text().splitlines()]
        committed = [line for line in lines if line[0] == "done"]
        commits += len(committed)
        for _, generation, turn in committed:
            state[int(generation)] = -1 if turn == "none" else int(turn)
        expected = [{g: t for g, t in state.items() if t >= 0}]
        if lines[-1][0] == "trying":  # killed between: the version before it or the one after it
            in_the_middle += 1
            _, generation, turn = lines[-1]
            after = expected[0] | ({} if turn == "none" else {int(generation): int(turn)})
            if turn == "none":
                after.pop(int(generation), None)
            expected.append(after)
        found = store_worker.state_of(store)
        assert found in expected, f"kill {kill}: {lines[-2:]}"
        state = found
    for reader in readers:
        assert reader.poll() is None, [path.read_text() for path in fast_dir.glob("reader*.txt")]
        reader.kill()
        reader.wait()
    seen = [(fast_dir / f"reader{n}.txt").read_text().split() for n in range(2)]
    assert all(len(set(versions)) >= 5 for versions in seen), seen  # they read while versions changed
    assert in_the_middle >= 2
    assert commits >= 3 * KILLS
    store.write(store_worker.documents(99, 1), [[store_worker.vector(99, 1, n)] for n in range(store_worker.SIZE)])
    assert store_worker.state_of(store) == state | {99: 1}  # and the next writer finds the lock free
