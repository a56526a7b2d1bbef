"""One thread that writes, one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs jobs beside the training loop. An error of a job is raised in the loop, when it asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job once the one before it is done.

        Raises:
            BaseException: what the job before it raised.
        """
        self.wait()
        # A daemon: a second Ctrl-C must not wait for a disk. Whoever wants what was written calls `wait`.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the job is done.

        Raises:
            BaseException: what it raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Without waiting.

        Raises:
            BaseException: what a job raised; once.
        """
        if (error := self._error) is not None:
            self._error = None
            raise error

    @property
    def failed(self) -> bool:
        """Whether `check` would raise."""
        return self._error is not None

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # the loop raises it
            self._error = error
