"""Where shards lie: the one place that knows local files from remote ones.

local     a path: mapped while it is scanned, read in place, its index beside it
remote    a url (`server.py`), read through a cache of its blocks (`file.py`), its index in the cache's folder
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from mmctx.datasets.remote import server as remote
from mmctx.datasets.remote.block_cache import BlockCache
from mmctx.datasets.remote.file import RemoteBuffer, RemoteFile, fetch_all
from mmctx.datasets.remote.server import RemoteShard
from mmctx.errors import DataError

Shard = Path | RemoteShard
"""A local file, or a remote one as it was when it was looked up. `str` of it names it."""


class ShardFile(Protocol):
    """A shard opened for reading at any place; threads may share it."""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where a local file ends."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> ShardFile: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> None: ...


class Buffer(Protocol):
    """The bytes of a shard as a sequence; only what is sliced is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


def is_remote(name: str) -> bool:
    """Whether a shard's name is a url.

    Raises:
        DataError: it is a command, or a url whose protocol shards are not read by.
    """
    if name.startswith("pipe:"):
        raise DataError(f"{name}: names of shards never run programs; give a path or a url that holds the bytes")
    return "://" in name and remote.protocol_of(name) != "file"


def local_path(name: str) -> str:
    """The path that a name or a ``file://`` url stands for."""
    if name.startswith("file://") and not name.startswith("file:///"):
        raise DataError(f"{name}: a file url has three slashes before its path, such as file:///data/x.tar")
    return name.removeprefix("file://")


def find_remote(urls: Iterable[str], cache: BlockCache) -> list[RemoteShard]:
    """The shards that urls name, wildcards among them, in order; one named twice comes once.

    Raises:
        DataError: a url names no shard.
    """
    urls = list(urls)
    plain = [url for url in urls if not remote.has_wildcards(url)]
    found = dict(zip(plain, remote.look_up(plain, cache), strict=True))
    groups = ([found[url]] if url in found else remote.match(url, cache) for url in urls)
    return list(dict.fromkeys(shard for group in groups for shard in group))


def as_shard(name: str | Shard, cache: BlockCache | None = None) -> Shard:
    """The shard of a name without braces and wildcards."""
    if isinstance(name, RemoteShard):
        return name
    if is_remote(str(name)):
        return remote.look_up([str(name)], cache or BlockCache.at())[0]
    return Path(local_path(str(name)))


def is_local(shard: Shard) -> bool:
    """Whether reading a shard asks no server."""
    return not isinstance(shard, RemoteShard)


def stamp(shard: Shard) -> dict[str, int | str]:
    """What tells this version of a shard from others: its size, and its mtime or what its server says in place of one.

    Raises:
        DataError: the shard is missing.
    """
    if isinstance(shard, RemoteShard):
        return {"size": shard.size, "etag": shard.version}
    try:
        found = shard.stat()
    except FileNotFoundError:
        raise DataError(f"{shard}: no such shard; check the path or fetch the file") from None
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def index_path(shard: str | Shard) -> str:
    """Where the index of a shard lies: beside it, or for a remote one in the folder of its cache."""
    if isinstance(shard, RemoteShard):
        return f"{shard.cache.folder}/indexes/{shard.name}.index"
    return f"{shard}.index"  # as a string: this is on the way of every sample


def uploaded_index(shard: Shard, name: str) -> bytes | None:
    """A file of the index that lies beside a remote shard, None if there is none; a local shard's index needs no copy."""
    return remote.read_beside(shard, name) if isinstance(shard, RemoteShard) else None


def open_shard(shard: str | Shard) -> ShardFile:
    """Opens a shard.

    Raises:
        DataError: a local one cannot be opened. A remote one is asked for when it is read.
    """
    if isinstance(shard, RemoteShard):
        return RemoteFile(shard)
    try:
        return LocalFile(shard)
    except OSError as error:
        raise DataError(
            f"{shard}: cannot be opened ({error.strerror}); restore the shard or remove it from the source"
        ) from None


def prefetch(wanted: Iterable[tuple[ShardFile, list[tuple[int, int]]]]) -> None:
    """Brings every (offset, size) of remote files into the local cache, several requests at once; local files need nothing.

    Raises:
        DataError: a shard changed, or its server cannot be reached.
    """
    jobs = [(file, run) for file, ranges in wanted if isinstance(file, RemoteFile) for run in file.missing(ranges)]
    for _ in fetch_all(jobs):
        pass


@contextlib.contextmanager
def map_file(path: str | Shard) -> Iterator[Buffer]:
    """The bytes of a shard: mapped, or fetched as they are sliced.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    empty = f"{path}: found 0 bytes, expected a tar archive; copy or write it again"
    if isinstance(path, RemoteShard):
        if not path.size:
            raise DataError(empty)
        yield RemoteBuffer(RemoteFile(path))
        return
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError(empty)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"{path}: no such shard; check the path or fetch the file") from None
    except OSError as error:
        raise DataError(
            f"{path}: the shard cannot be read ({error.strerror}); check that it is a file and its mode"
        ) from None
    with mapped:
        yield mapped


class LocalFile(FileIO):
    """A file on disk, read in place."""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends."""
        return os.pread(self.fileno(), size, offset)
