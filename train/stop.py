"""Stopping when asked to: Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from typing import Any


class StopOnSignal:
    """Turns SIGINT and SIGTERM into a wish that the loop grants after its current step; a second signal is not caught."""

    def __init__(self) -> None:
        self.wished = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.wished = True
        signal.signal(number, self._before[number])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
