"""Two ranks without processes: threads that wait for each other whenever they gather."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from mmctx.eval import EvalContext, Ranks

Found = TypeVar("Found")


def on_two_ranks(context: EvalContext, evaluate: Callable[[EvalContext], Found]) -> list[Found]:
    """What `evaluate` finds on rank 0 and on rank 1 of two, which share its work. What they gather is pickled, as between processes.

    A rank that fails ends the other's waiting, too, and its error is raised.
    """
    barrier = threading.Barrier(2)
    board: list[bytes] = [b"", b""]

    def work(rank: int) -> Found:
        def gather(found: Any) -> list[Any]:
            board[rank] = pickle.dumps(found)
            barrier.wait(timeout=300)
            everyone = [pickle.loads(part) for part in board]
            barrier.wait(timeout=300)  # nobody writes before both have read
            return everyone

        try:
            return evaluate(replace(context, ranks=Ranks(rank, 2, gather)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(work, rank) for rank in range(2)]
    errors = [error for future in pending if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in pending]
