"""The cache of blocks under many processes and kills, and which requests a set of ranges takes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmctx.datasets.remote import block_cache
from mmctx.datasets.remote import file as remote_file
from mmctx.datasets.remote.block_cache import BlockCache
from mmctx.datasets.remote.file import RemoteFile, coalesce
from mmctx.datasets.remote.storage import open_shard, prefetch
from mmctx.datasets.shards.index import expand_shards
from mmctx.errors import DataError

BLOCK = 1000


def blocks_of(cache: BlockCache) -> list[Path]:
    return [path for path in Path(cache.folder, "blocks").glob("*/*") if not path.name.startswith(".")]


def age(cache: BlockCache, shard: str, number: int, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(Path(cache.folder, "blocks", shard, str(number)), (when, when))


def content(number: int) -> bytes:
    return number.to_bytes(4, "big") * (BLOCK // 4)


def test_blocks_that_were_not_read_for_longest_go_first(tmp_path):
    cache = BlockCache(str(tmp_path), 10 * BLOCK)
    for number in range(10):
        cache.write("a", number, content(number))
        age(cache, "a", number, 1000 - number)
    assert cache.read("a", 0, 4, 12) == content(0)[4:12]  # which makes it the newest
    cache.write("b", 0, content(99))
    left = {int(path.name) for path in blocks_of(cache) if path.parent.name == "a"}
    assert left == {0, 3, 4, 5, 6, 7, 8, 9}
    assert cache.read("a", 1, 0, 4) is None
    assert cache.read("b", 0, 0, BLOCK) == content(99)


def test_a_block_larger_than_the_bound_is_not_kept(tmp_path):
    cache = BlockCache(str(tmp_path), BLOCK)
    cache.write("a", 0, bytes(2 * BLOCK))
    assert not cache.has("a", 0)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "blocks").write_text("a file in the way")
    with pytest.raises(DataError, match=r"cannot be kept .*data\.remote_cache_dir"):
        BlockCache(str(tmp_path), 10 * BLOCK).write("a", 0, content(0))


def _write_forever(cache: BlockCache, seed: int) -> None:
    for number in range(seed * 1_000_000, (seed + 1) * 1_000_000):
        cache.write("a", number, content(number))


def test_processes_that_are_killed_leave_whole_blocks_and_the_bound(tmp_path):
    cache = BlockCache(str(tmp_path), 50 * BLOCK)
    processes = [multiprocessing.get_context("fork").Process(target=_write_forever, args=(cache, n)) for n in range(4)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        found = [(int(path.name), path) for path in blocks_of(cache)]
        assert len(found) <= 50
        for number, path in found:
            try:
                assert path.read_bytes() == content(number)
            except FileNotFoundError:  # evicted since
                continue
    for process in processes:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    for number in range(60):  # no lock and no count is left in the way
        cache.write("b", number, content(number))
    assert cache.read("b", 59, 0, BLOCK) == content(59)
    assert sum(path.stat().st_size for path in blocks_of(cache)) <= cache.max_bytes


def test_parts_of_killed_writers_go_in_time(tmp_path, monkeypatch):
    cache = BlockCache(str(tmp_path), 10 * BLOCK)
    cache.write("a", 0, content(0))
    part = tmp_path / "blocks" / "a" / ".half"
    part.write_bytes(bytes(9 * BLOCK))
    monkeypatch.setattr(block_cache, "_ABANDONED", -1.0)
    for number in range(1, 12):
        cache.write("a", number, content(number))
    assert not part.exists()


@given(st.sets(st.integers(0, 60)), st.integers(0, 3), st.integers(1, 9))
def test_runs(numbers, gap, limit):
    runs = coalesce(numbers, gap, limit)
    covered = [number for first, last in runs for number in range(first, last + 1)]
    assert covered == sorted(set(covered))
    assert numbers <= set(covered)
    for first, last in runs:
        assert {first, last} <= numbers
        assert last - first < limit
        inside = sorted(number for number in numbers if first <= number <= last)
        assert all(b - a <= gap + 1 for a, b in itertools.pairwise(inside))
    for (a, b), (c, _) in itertools.pairwise(runs):
        assert c - b > gap + 1 or c - a >= limit  # else they would be one


SIZE = 5000
DATA = bytes(number * 7 % 251 for number in range(SIZE))
RANGES = st.lists(
    st.integers(0, SIZE).flatmap(lambda a: st.tuples(st.just(a), st.integers(0, min(400, SIZE - a)))), max_size=20
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RANGES, RANGES, st.booleans())
def test_ranges_in_any_order_are_the_bytes_of_the_file(tmp_path_factory, monkeypatch, first, second, tiny):
    """Blocks of 64 bytes; the second set finds what the first left, or nothing where the cache holds less than a block."""
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 64)
    fsspec.filesystem("memory").pipe("/property/x.tar", DATA)
    cache = BlockCache(str(tmp_path_factory.mktemp("cache")), 10 if tiny else 1 << 20)
    (shard,) = expand_shards("memory://property/x.tar", cache)
    file = open_shard(shard)
    assert isinstance(file, RemoteFile)
    requests: list[tuple[int, int]] = []
    ask = file._connection.read
    monkeypatch.setattr(file._connection, "read", lambda *span: requests.append(span) or ask(*span))
    seen: set[int] = set()
    for ranges in (first, second):
        requests.clear()
        assert file.read_many(ranges) == [DATA[a : a + n] for a, n in ranges]
        assert [file.read_at(a, n) for a, n in ranges] == [DATA[a : a + n] for a, n in ranges]
        wanted = {block for a, n in ranges if n for block in range(a // 64, (a + n - 1) // 64 + 1)}
        if not tiny:
            assert len(requests) <= len(wanted - seen)
            assert ranges is second or len(requests) <= sum(n > 0 for _, n in ranges)  # what is there may split a range
            asked = [block for a, n in requests for block in range(a // 64, (a + n - 1) // 64 + 1)]
            assert len(asked) == len(set(asked))
            seen |= set(asked)
    before = len(requests)
    prefetch([(file, second)])
    assert tiny or len(requests) == before


def test_ranges_outside_the_shard(tmp_path):
    fsspec.filesystem("memory").pipe("/property/x.tar", DATA)
    (shard,) = expand_shards("memory://property/x.tar", BlockCache(str(tmp_path), 1 << 20))
    with open_shard(shard) as file, pytest.raises(DataError, match=r"offset 4990: should have 11 bytes.*5000 in all"):
        file.read_at(4990, 11)
