"""A bounded cache of blocks of files on the local disk, shared by all processes of a host.

    FOLDER/blocks/SHARD/NUMBER    bytes NUMBER * BLOCK_BYTES and on, the last block shorter
    FOLDER/blocks/usage           bytes that blocks take, guarded by a lock on this file
    FOLDER/locks/NN               whoever holds one fetches blocks; others wait for them
    FOLDER/indexes/SHARD.index    indexes of remote shards (`sidecar.py`); these stay until someone deletes them

Blocks appear whole, under their name, or not at all; locks end with the process that holds them. So processes may be
killed at any time. Blocks that were not read for longest go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmctx.errors import DataError
from mmctx.user_cache import user_cache

BLOCK_BYTES = 1 << 21
"""Small enough that a lone sample brings little else, large enough that a request is mostly data, not waiting."""

_DEFAULT_GB = 20.0
_TOUCH_AFTER = 30.0  # seconds; a block that is read all the time is not touched all the time
_ROOM = 0.9  # of the bound that is left when blocks are evicted: looking at all of them must be rare
_ABANDONED = 3600.0  # seconds after which a part of a block has no writer any more
_LOCKS = 256


@dataclass(frozen=True, slots=True)
class BlockCache:
    """Holds no state but its name and bound: it may be pickled and forked.

    Attributes:
        folder: where it lies.
        max_bytes: that its blocks may take.
    """

    folder: str
    max_bytes: int

    @classmethod
    def at(cls, folder: str | None = None, gigabytes: float = _DEFAULT_GB) -> BlockCache:
        """The cache in `folder`, by default ``$XDG_CACHE_HOME/mmctx`` (``~/.cache/mmctx``), bounded in GiB."""
        base = folder or str(user_cache())
        return cls(os.path.abspath(os.path.expanduser(base)), int(gigabytes * 2**30))

    def has(self, shard: str, number: int) -> bool:
        """Whether a block is there."""
        return os.path.exists(self._path(shard, number))

    def read(self, shard: str, number: int, start: int, stop: int) -> bytes | None:
        """Bytes ``start:stop`` of a block, None if it is not there."""
        path = self._path(shard, number)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); make it yours, or set data.remote_cache_dir to a folder that is"
            ) from None
        try:
            if time.time() - os.fstat(fd).st_mtime > _TOUCH_AFTER:
                with contextlib.suppress(OSError):  # someone else's block: then their reads alone keep it
                    os.utime(fd)
            data = os.pread(fd, stop - start, start)
        finally:
            os.close(fd)
        if len(data) == stop - start:
            return data
        with contextlib.suppress(FileNotFoundError):  # no block of ours is short: the disk has lost something
            os.unlink(path)
        return None

    def write(self, shard: str, number: int, data: bytes) -> None:
        """Keeps a block, in the place of older ones where the bound asks for it.

        Raises:
            DataError: the folder cannot be written.
        """
        path = self._path(shard, number)
        part = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not self._reserve(len(data), part):
                return
            with open(part, "r+b") as file:
                file.write(data)
                file.flush()
                os.fdatasync(file.fileno())  # or a power cut could leave a block of zeros under a good name
            with _locked(self._usage()):  # whoever adds up what is there must not miss it between its two names
                os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise DataError(
                f"{self.folder}: blocks of remote shards cannot be kept ({error.strerror}); make room there or set "
                "data.remote_cache_dir and data.remote_cache_gb"
            ) from None

    @contextlib.contextmanager
    def fetching(self, shard: str, number: int) -> Iterator[None]:
        """Held while a block is fetched: whoever wants the same one meanwhile waits, and then finds it."""
        folder = os.path.join(self.folder, "locks")
        os.makedirs(folder, exist_ok=True)
        stripe = zlib.crc32(f"{shard}/{number}".encode()) % _LOCKS
        with _locked(os.path.join(folder, f"{stripe:02x}")):
            yield

    def _path(self, shard: str, number: int) -> str:
        return f"{self.folder}/blocks/{shard}/{number}"

    def _usage(self) -> str:
        return f"{self.folder}/blocks/usage"

    def _reserve(self, size: int, part: str) -> bool:
        """Makes `part` as large as it will be, so that it counts before it is written; whether there can be room for it."""
        if size > self.max_bytes * _ROOM:
            return False
        with _locked(self._usage()) as fd:
            known = os.pread(fd, 32, 0)
            usage = int(known) if known.isdigit() else None
            if usage is None or usage + size > self.max_bytes:
                usage = self._evict(int(self.max_bytes * _ROOM) - size)
            os.pwrite(fd, b"%020d" % (usage + size), 0)  # first: whoever dies in between leaves too high a count
            with open(part, "wb") as file:
                file.truncate(size)
        return True

    def _evict(self, room: int) -> int:
        """Deletes blocks, those that were not read for longest first, until the rest takes at most `room` bytes.

        Returns:
            Bytes that are left.
        """
        found, usage = [], 0
        for block in Path(self.folder, "blocks").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # a part whose writer has given up
                about = block.stat()
                usage += about.st_size
                part = block.name.startswith(".")
                if not part or time.time() - about.st_mtime > _ABANDONED:
                    found.append((0.0 if part else about.st_mtime, about.st_size, block))
        for _, size, block in sorted(found):
            if usage <= room:
                break
            block.unlink(missing_ok=True)
            usage -= size
        return usage


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile holds the same lock
        os.close(fd)
