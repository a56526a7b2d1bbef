"""Loader processes that are watched: each says what it reads, so that one that hangs or dies can be named."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from mmctx.errors import DataError
from mmctx.pack import PackedBatch

_NOTHING = -1


class ReadingBoard:
    """Shared memory with a row for each loader process: what it reads now, and since when.

    Args:
        num_workers: loader processes.
    """

    _WIDTH = 4  # process id, source, sample, milliseconds on the clock that all processes share

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._rows = multiprocessing.RawArray("q", [_NOTHING] * (self._WIDTH * num_workers))

    def note(self, worker: int, source: int, sample: int) -> None:
        """A worker begins with a sample."""
        start = worker * self._WIDTH
        self._rows[start : start + self._WIDTH] = [os.getpid(), source, sample, int(time.monotonic() * 1000)]

    def read(self, worker: int) -> tuple[int, int, int, float]:
        """Process id, source, sample (-1 for none so far) and seconds since it began with it."""
        pid, source, sample, since = self._rows[worker * self._WIDTH : (worker + 1) * self._WIDTH]
        return pid, source, sample, time.monotonic() - since / 1000


class WatchedLoader:
    """Batches of a `DataLoader` with workers, in order; what goes wrong with a worker is an error that says what it was reading.

    When an iterator over them is closed, or forgotten, its workers end at once.

    Args:
        loader: over a `PackedDataset`.
        board: of its workers.
    """

    def __init__(self, loader: DataLoader[PackedBatch], board: ReadingBoard) -> None:
        self.loader, self.board = loader, board

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PackedBatch]:
        others = multiprocessing.active_children()
        batches: Any = iter(self.loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        end = atexit.register(partial(_end, workers, os.getpid()))  # before multiprocessing and torch wait for them
        try:
            for number in range(1 << 62):
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if not str(error).startswith("DataLoader"):  # what a worker raised itself
                        raise
                    raise DataError(self.explain(error, number % self.board.num_workers)) from error
                yield batch
        finally:
            end()
            atexit.unregister(end)
            with suppress(Exception):
                batches._shutdown_workers()  # takes their ids from torch's handler of SIGCHLD

    def explain(self, error: Exception, due: int) -> str:
        """What is known about a worker that hangs or has died: the one whose batch is due, or whichever is gone."""
        alive = {process.pid for process in multiprocessing.active_children()}
        gone = [w for w in range(self.board.num_workers) if self.board.read(w)[0] not in (_NOTHING, *alive)]
        worker = gone[0] if gone else due
        pid, source, sample, seconds = self.board.read(worker)
        remedy = (
            "it died: look for lack of memory (dmesg), lower data.num_workers or data.prefetch"
            if gone
            else f"no batch within data.worker_timeout={self.loader.timeout:g} s: look at the storage, or raise it"
        )
        if source == _NOTHING:
            return f"loader worker {worker} had not begun to read anything; {remedy} ({error})"
        where = self.loader.dataset.describe(source, sample)  # type: ignore[attr-defined]
        return f"loader worker {worker} (process {pid}) was reading {where}, for {seconds:.0f} s; {remedy} ({error})"


def _end(workers: list[Any], owner: int) -> None:
    """Whatever they are at: they ignore SIGTERM, and this process could not end before them. They only read."""
    for process in workers if os.getpid() == owner else ():  # not in a fork of theirs
        with suppress(RuntimeError):  # torch's handler of SIGCHLD takes it for an accident
            process.kill()
            process.join()


class StartWorker:
    """What a loader process does first.

    Args:
        board: where it will say what it reads.
    """

    def __init__(self, board: ReadingBoard) -> None:
        self.board = board

    def __call__(self, worker: int) -> None:
        """Ctrl-C and a scheduler's SIGTERM reach the whole process group; workers must live until the run has saved."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.board.note(worker, _NOTHING, _NOTHING)
        info: Any = get_worker_info()
        info.dataset.note_reading = lambda source, sample: self.board.note(worker, source, sample)
