"""One writer at a time: a lock that the kernel lets go when its holder dies, by whatever signal."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmctx.errors import MmctxError


@contextmanager
def writing(folder: Path, timeout: float) -> Iterator[None]:
    """Holds the folder's lock.

    Args:
        folder: of the store.
        timeout: seconds to wait for another writer.

    Raises:
        MmctxError: another process held it all the time; it is named.
    """
    path = folder / ".lock"
    with path.open("a+") as file:
        ends = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:
                    file.seek(0)
                    raise MmctxError(
                        f"{folder}: process {file.read().strip() or '?'} has been writing for {timeout:g} s; wait for it, or stop it"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield  # closing the file lets go
