"""Times one side of `image_text.py` in its own process: the first batch, then a steady stretch. Imports nothing of ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any


def measure(build: Callable[[], Iterable[Any]], use: Callable[[Any], int], num_samples: int) -> None:
    """Prints the seconds of three stretches: building the pipeline, its first batch, and after that each sample.

    Each by the clock and by the processor: a side is one process of one thread, so on a shared machine the processor's time is the
    steadier of the two. Imports are over by now.

    Args:
        build: everything between shards and an iterable of batches.
        use: makes of a batch what a model takes; returns how many samples it holds.
        num_samples: to read after the first batch.
    """
    times: dict[str, dict[str, float]] = {}

    def lap(name: str, share: int = 1) -> None:
        nonlocal since
        now = time.perf_counter(), time.process_time()
        passed = [(after - before) / share for before, after in zip(since, now, strict=True)]
        times[name] = dict(zip(("clock", "processor"), passed, strict=True))
        since = now

    since = time.perf_counter(), time.process_time()
    loader = build()
    lap("build")
    batches = iter(loader)
    use(next(batches))
    lap("first_batch")
    count = 0
    while count < num_samples:
        count += use(next(batches))
    lap("sample", count)
    print(json.dumps(times))
