"""When an index is rebuilt, and what several processes leave."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from make_shards import make_triples, train_tokenizer, write_shard

from mmctx.datasets.shards import sidecar
from mmctx.datasets.shards.index import index_shard
from mmctx.datasets.shards.sidecar import index_folder
from mmctx.tokenizer import TextTokenizer

TEXTS = ("txt", "json:names.zh", "json:names.fr")


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_shard(tmp_path / "x-0000.tar", make_triples(6))


def count_builds(monkeypatch) -> list[str]:
    """Records which part of an index is rebuilt."""
    calls: list[str] = []
    for name in ("measure_shard", "count_tokens"):
        original = getattr(sidecar, name)
        monkeypatch.setattr(sidecar, name, lambda *a, o=original, n=name: (calls.append(n), o(*a))[1])
    return calls


def test_rebuilt_only_when_stale(shard, tokenizer, monkeypatch):
    calls = count_builds(monkeypatch)
    index_shard(shard, tokenizer, ("txt",))
    index_shard(shard, tokenizer, ("txt",))
    assert calls == ["measure_shard", "count_tokens"]
    os.utime(shard)  # another mtime, the same content
    index_shard(shard, tokenizer, ("txt",))
    assert calls == ["measure_shard", "count_tokens"]
    monkeypatch.setattr(sidecar, "content_hash", lambda *a: pytest.fail("the new mtime was not recorded"))
    index_shard(shard, tokenizer, ("txt",))


def test_changed_content_is_indexed_again(shard, tokenizer):
    before = index_shard(shard, tokenizer, ("txt",))
    assert len(before.keys) == 6  # mapped now: the new index must not be taken for the old one
    size = shard.stat().st_size
    write_shard(shard, make_triples(4, seed=5))
    os.truncate(shard, size)  # zeros: the end of an archive
    after = index_shard(shard, tokenizer, ("txt",))
    assert [k.decode() for k in after.keys] == [f"dir/005-{n:05d}" for n in range(4)]


def test_tokens_alone_are_rebuilt(shard, tokenizer, other_tokenizer, monkeypatch):
    first_index = index_shard(shard, tokenizer, ("txt",))
    calls = count_builds(monkeypatch)
    other = index_shard(shard, other_tokenizer, ("txt",))
    more = index_shard(shard, tokenizer, TEXTS)
    assert calls == ["count_tokens"] * 2
    assert other.tokens is not None
    assert first_index.tokens is not None
    assert other.tokens[0, 0] == len(b"caption number 0") > first_index.tokens[0, 0]
    assert more.tokens is not None
    assert more.tokens.shape == (6, 3)


def test_force_and_leftovers(shard, tokenizer, monkeypatch):
    index_shard(shard, tokenizer, ("txt",))
    calls = count_builds(monkeypatch)
    index_shard(shard, tokenizer, ("txt",), force=True)
    assert calls == ["measure_shard", "count_tokens"]
    assert sorted(p.name for p in shard.parent.iterdir()) == [shard.name, index_folder(shard).name]
    assert len(list(index_folder(shard).iterdir())) == 7
    assert not any(p.name.startswith(".") for p in index_folder(shard).iterdir())


def test_an_index_that_another_process_put_there_meanwhile_is_kept(shard, tokenizer, monkeypatch):
    measure, inodes = sidecar.measure_shard, []

    def interrupted(*args):
        monkeypatch.setattr(sidecar, "measure_shard", measure)
        index_shard(shard, tokenizer, ("txt",))
        inodes.append(index_folder(shard).stat().st_ino)
        return measure(*args)

    monkeypatch.setattr(sidecar, "measure_shard", interrupted)
    index_shard(shard, tokenizer, ("txt",))
    assert inodes == [index_folder(shard).stat().st_ino]
    assert len(list(shard.parent.iterdir())) == 2


def test_a_copy_that_may_not_be_written_stays_fresh(shard, tokenizer, monkeypatch):
    index_shard(shard, tokenizer, ("txt",))
    os.utime(shard)

    def refuse(*args):
        raise PermissionError

    monkeypatch.setattr(sidecar, "_write_json", refuse)
    assert index_shard(shard, tokenizer, ("txt",)).num_samples == 6


def _index_often(shard: Path, folder: Path, start, times: int) -> None:
    tokenizer = TextTokenizer(folder)
    start.wait()
    for _ in range(times):
        index = index_shard(shard, tokenizer, TEXTS, force=True)
        assert index.num_samples == 6


def test_two_processes_at_once_leave_a_whole_index(shard, tmp_path):
    folder = train_tokenizer(tmp_path / "tokenizer", 300)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=_index_often, args=(shard, folder, start, 20)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    index = index_shard(shard, TextTokenizer(folder), TEXTS)
    assert len(index.samples) == len(index.keys) == 6
    assert not [p for p in shard.parent.iterdir() if p.name.startswith(".")]
