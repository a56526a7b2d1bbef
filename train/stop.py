"""Stopping when asked to: Ctrl-C, and SIGTERM, which schedulers and torchrun send."""

from __future__ import annotations

import signal
from typing import Any


class StopOnSignal:
    """Turns SIGINT and SIGTERM into a wish that the loop grants after its current step.

    A second SIGINT aborts at once: somebody sits there and does not want to wait. A second SIGTERM changes nothing: a scheduler signals all
    processes of a job, and torchrun, which is one of them, hands on to its ranks what they have received already.

    Attributes:
        wished: the signal that came first; None while none has.
    """

    def __init__(self) -> None:
        self.wished: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.wished is None:
            self.wished = signal.Signals(number)
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def exit_code(wish: signal.Signals) -> int:
    """130 for SIGINT and 143 for SIGTERM, as shells count: 128 and the signal's number."""
    return 128 + wish
