"""Times the sides of `image_text.py` and `resume.py`, each in its own process. Imports nothing of ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any


class Laps:
    """Seconds of one stretch after another, by the clock and by the processor.

    A side is one process of one thread, so on a shared machine the processor's time is the steadier of the two.
    """

    def __init__(self) -> None:
        self.times: dict[str, dict[str, float]] = {}
        self._since = time.perf_counter(), time.process_time()

    def lap(self, name: str, share: int = 1) -> None:
        """Ends a stretch; what it took is divided by `share`."""
        now = time.perf_counter(), time.process_time()
        passed = [(after - before) / share for before, after in zip(self._since, now, strict=True)]
        self.times[name] = dict(zip(("clock", "processor"), passed, strict=True))
        self._since = now


def measure(build: Callable[[], Iterable[Any]], use: Callable[[Any], int], num_samples: int) -> None:
    """Prints the seconds of three stretches: building the pipeline, its first batch, and after that each sample.

    Args:
        build: everything between shards and an iterable of batches; imports are over by now.
        use: makes of a batch what a model takes; returns how many samples it holds.
        num_samples: to read after the first batch.
    """
    laps = Laps()
    loader = build()
    laps.lap("build")
    batches = iter(loader)
    use(next(batches))
    laps.lap("first_batch")
    count = 0
    while count < num_samples:
        count += use(next(batches))
    laps.lap("sample", count)
    print(json.dumps(laps.times))
