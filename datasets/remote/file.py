"""A remote shard as a file and as a sequence of bytes, both read through the cache of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from mmctx.datasets.remote.block_cache import BLOCK_BYTES
from mmctx.datasets.remote.server import Connection, RemoteShard
from mmctx.errors import DataError

_MAX_GAP = 1  # blocks between two wanted ones that cost less to read than another request
_MAX_RUN = 8  # blocks of one request
_REQUESTS_AT_ONCE = 8


class RemoteFile:
    """A remote shard, read through the cache of its blocks."""

    def __init__(self, shard: RemoteShard) -> None:
        self.shard = shard
        self._connection = Connection(shard)

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open: connections belong to the process."""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`.

        Raises:
            DataError: the range lies outside, the shard changed, or its server cannot be reached.
        """
        return self.read_many([(offset, size)])[0]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of every (offset, size), in the same order; neighbours share requests, the rest are asked for at once.

        Raises:
            DataError: a range lies outside, the shard changed, or its server cannot be reached.
        """
        for offset, size in ranges:
            if offset < 0 or size < 0 or offset + size > self.shard.size:
                raise DataError(
                    f"{self.shard}: offset {offset}: should have {size} bytes, the shard has {self.shard.size} in all; "
                    "rebuild its index with `mmctx data index --force`"
                )
        groups = fetch_all([(self, run) for run in self.missing(ranges)])
        fetched = {number: data for group in groups for number, data in group.items()}
        return [self._cut(offset, size, fetched) for offset, size in ranges]

    def missing(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Runs (first, last) of blocks that reading every (offset, size) would have to ask the server for."""
        numbers = {number for offset, size in ranges for number in _numbers(offset, size)}
        return coalesce(number for number in numbers if not self.shard.cache.has(self.shard.name, number))

    def fetch(self, run: tuple[int, int]) -> dict[int, bytes]:
        """Brings those blocks of a run (first, last) into the cache that it lacks, in one request.

        Returns:
            What was brought, by number: a small cache may have lost it again. Nothing if another process was faster.
        """
        cache, name = self.shard.cache, self.shard.name
        with cache.fetching(name, run[0]):
            wanted = [number for number in range(run[0], run[1] + 1) if not cache.has(name, number)]
            if not wanted:
                return {}
            start = wanted[0] * BLOCK_BYTES
            data = self._connection.read(start, min((wanted[-1] + 1) * BLOCK_BYTES, self.shard.size) - start)
            blocks = _split(data, wanted[0])
            for number in wanted:
                cache.write(name, number, blocks[number])
            return blocks

    def _cut(self, offset: int, size: int, fetched: Mapping[int, bytes]) -> bytes:
        parts = []
        for number in _numbers(offset, size):
            first = number * BLOCK_BYTES
            parts.append(self._part(number, max(0, offset - first), min(BLOCK_BYTES, offset + size - first), fetched))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, number: int, start: int, stop: int, fetched: Mapping[int, bytes]) -> bytes:
        while True:
            block = fetched.get(number)
            part = self.shard.cache.read(self.shard.name, number, start, stop) if block is None else block[start:stop]
            if part is not None:
                return part
            fetched = self.fetch((number, number))  # it was evicted since


class RemoteBuffer:
    """A remote shard as a sequence of bytes, for reading from its start to its end, with leaps.

    While block follows block, each request asks for twice as many as the last; what a large member makes a reader leap over is not fetched.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._blocks: dict[int, bytes] = {}  # of the last request
        self._window = 1
        self._next = -1  # the block after those

    def __len__(self) -> int:
        return self._file.shard.size

    def __getitem__(self, part: slice, /) -> bytes:
        start, stop, _ = part.indices(len(self))
        return b"".join(self._piece(number, start, stop) for number in _numbers(start, max(0, stop - start)))

    def _piece(self, number: int, start: int, stop: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            self._window = min(2 * self._window, _MAX_RUN) if number == self._next else 1
            last = min(number + self._window, -(-len(self) // BLOCK_BYTES))
            first, end = number * BLOCK_BYTES, min(last * BLOCK_BYTES, len(self))
            data = self._file.read_at(first, end - first)
            self._blocks = _split(data, number)
            self._next, block = last, self._blocks[number]
        base = number * BLOCK_BYTES
        return block[max(0, start - base) : max(0, stop - base)]


def fetch_all(jobs: Sequence[tuple[RemoteFile, tuple[int, int]]]) -> Iterator[dict[int, bytes]]:
    """`RemoteFile.fetch` of many runs, several at once, in their order."""
    if len(jobs) < 2:
        yield from (file.fetch(run) for file, run in jobs)
        return
    with ThreadPoolExecutor(min(len(jobs), _REQUESTS_AT_ONCE)) as pool:
        yield from pool.map(lambda job: job[0].fetch(job[1]), jobs)


def coalesce(numbers: Iterable[int], gap: int = _MAX_GAP, limit: int = _MAX_RUN) -> list[tuple[int, int]]:
    """Runs (first, last) of at most `limit` blocks that cover `numbers`; up to `gap` blocks nobody asked for join two of them."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number - runs[-1][1] <= gap + 1 and number - runs[-1][0] < limit:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _numbers(offset: int, size: int) -> range:
    """Blocks that a range touches."""
    return range(offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES) if size else offset // BLOCK_BYTES)


def _split(data: bytes, first: int) -> dict[int, bytes]:
    """Bytes that begin with block `first`, as blocks by number."""
    return {first + at // BLOCK_BYTES: data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)}
