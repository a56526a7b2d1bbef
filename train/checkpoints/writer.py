"""One thread that writes, one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs jobs beside the training loop. An error of a job comes out when the loop waits."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job once the one before it is done."""
        self.join()
        # A daemon: a second Ctrl-C must not wait for a disk. Whoever wants what was written calls `wait`.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Until the job is done, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the job is done.

        Raises:
            BaseException: what a job raised; once.
        """
        self.join()
        if (error := self._error) is not None:
            self._error = None
            raise error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise."""
        return self._error is not None

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # the loop will raise it
            self._error = error
