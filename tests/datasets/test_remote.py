"""Shards behind a url against the same shards on disk, from real servers on loopback."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from far_shards import TEXTS, drop_blocks, open_source, same, write_big_shard
from make_shards import make_document, make_triples, write_shard
from servers import FlakyServer

from mmctx.datasets.remote import retry
from mmctx.datasets.remote.block_cache import BLOCK_BYTES
from mmctx.datasets.remote.server import RemoteShard
from mmctx.datasets.remote.storage import open_shard
from mmctx.datasets.shards.index import expand_shards, index_shard, index_shards
from mmctx.datasets.shards.sidecar import index_folder
from mmctx.datasets.shards.source import Source
from mmctx.errors import DataError

pytest.importorskip("aiohttp", reason="needs the extra `remote`")


def test_index_and_samples_equal_those_of_local_shards(nginx, root, cache, tokenizer):
    shards = [write_shard(root / f"x-{n}.tar", [*make_triples(3 + n, seed=n), make_document()]) for n in range(2)]
    remote = open_source(nginx.url + "/x-{0..1}.tar", cache, tokenizer)
    assert not [path for path in root.iterdir() if path.suffix == ".index"]  # nothing is written beside the shards
    local = open_source(f"{root}/x-*.tar", cache, tokenizer)
    for far, near, path in zip(remote.shards, local.shards, shards, strict=True):
        assert str(far.path) == f"{nginx.url}/{path.name}"
        assert far.content_hash == near.content_hash  # so that a run may go on from a local copy, and back
        for name in ("samples", "media", "keys", "tokens"):
            np.testing.assert_array_equal(getattr(far, name), getattr(near, name))
    for number in np.random.default_rng(0).permutation(remote.num_samples).tolist():
        assert same(remote.read(number), local.read(number))
        assert remote.locate(number)[1] == local.locate(number)[1]
    copy = pickle.loads(pickle.dumps(remote))
    assert same(copy.read(1), local.read(1))


def test_an_index_is_made_once(nginx, root, cache, tokenizer):
    write_shard(root / "x.tar", make_triples(3))
    open_source(f"{nginx.url}/x.tar", cache, tokenizer)
    nginx.forget()
    open_source(f"{nginx.url}/x.tar", cache, tokenizer)
    assert nginx.requests("GET") == []
    assert len(nginx.requests("HEAD")) == 1


def test_indexing_reads_a_shard_once_in_growing_requests(nginx, root, cache, tokenizer):
    shard = write_big_shard(root / "x.tar", count=400, size=50_000)
    open_source(f"{nginx.url}/x.tar", cache, tokenizer)
    blocks = -(-shard.stat().st_size // BLOCK_BYTES)
    requests = nginx.requests("GET")
    assert requests.pop(0).status == 404  # there is no index beside it
    assert sum(request.bytes for request in requests) == shard.stat().st_size
    assert len(requests) < blocks / 2


def test_indexing_leaps_over_large_members(nginx, root, cache, tokenizer):
    shard = write_big_shard(root / "x.tar", count=3, size=20 << 20)
    open_source(f"{nginx.url}/x.tar", cache, tokenizer)
    assert sum(request.bytes for request in nginx.requests()) < shard.stat().st_size / 4


def test_neighbours_cost_one_request(nginx, root, cache):
    write_big_shard(root / "x.tar", count=300, size=40_000)
    source = open_source(f"{nginx.url}/x.tar", cache)
    drop_blocks(cache)
    nginx.forget()
    for number in (7, 3, 15, 0, 9, 12, 1, 4, 2, 11, 14, 5, 13, 8, 10, 6):
        source.read(number)
    assert len(nginx.requests()) == 1
    source.prefetch([72, 168, 264])  # of blocks 1, 3 and 5: what lies between them costs less than more requests
    assert len(nginx.requests()) == 2
    for number in range(300):
        source.read(number)
    assert len(nginx.requests()) == 3


@pytest.mark.slow
def test_a_server_may_restart(nginx, root, cache, caplog):
    write_big_shard(root / "x.tar", count=100, size=50_000)
    source = open_source(f"{nginx.url}/x.tar", cache)
    local = open_source(str(root / "x.tar"), cache)
    drop_blocks(cache)
    assert same(source.read(0), local.read(0))
    nginx.stop()
    threading.Timer(2.0, nginx.start).start()
    assert same(source.read(99), local.read(99))
    assert "trying again in" in caplog.text
    drop_blocks(cache)
    nginx.stop()
    threading.Timer(1.0, nginx.start).start()
    assert len(expand_shards(f"{nginx.url}/x.tar", cache)) == 1


def test_a_server_that_stays_away_is_given_up(nginx, root, cache, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 1.5)
    write_shard(root / "x.tar", make_triples(3))
    source = open_source(f"{nginx.url}/x.tar", cache)
    drop_blocks(cache)
    nginx.stop()
    size = (root / "x.tar").stat().st_size
    message = rf"x\.tar: offset 0, {size} bytes: \d attempts in \d\.\d s, last: .*[Cc]onnect.*check the network"
    with pytest.raises(DataError, match=message):
        source.read(2)


def test_what_is_missing_or_forbidden_is_not_tried_again(nginx, root, cache):
    began = time.monotonic()
    with pytest.raises(DataError, match=r"none\.tar: 1 attempt .*404.*check the url"):
        expand_shards(f"{nginx.url}/none.tar", cache)
    with pytest.raises(DataError, match=r"secret/x\.tar: 1 attempt .*403.*check the credentials"):
        expand_shards(f"{nginx.url}/secret/x.tar", cache)
    write_shard(root / "x-1.tar", make_triples(1))
    with pytest.raises(DataError, match=r"x-0\.tar: .*404.*\(2 of 3 shards failed\)"):
        expand_shards(nginx.url + "/x-{0..2}.tar", cache)
    source = open_source(f"{nginx.url}/x-1.tar", cache)
    drop_blocks(cache)
    (root / "x-1.tar").unlink()
    with pytest.raises(DataError, match=r"x-1\.tar: offset 0, .*404"):
        source.read(0)
    assert time.monotonic() - began < 10


def test_a_server_without_ranges(nginx, root, cache):
    shard = write_big_shard(root / "x.tar", count=100, size=50_000)
    with pytest.raises(DataError, match=r"whole/x\.tar: offset \d+: .*whole file.*copy them"):
        open_source(f"{nginx.url}/whole/x.tar", cache)
    (found,) = expand_shards(f"{nginx.url}/whole/x.tar", cache)
    with open_shard(found) as file:
        assert file.read_at(0, 1000) == shard.read_bytes()[:1000]  # the start of a whole file is right all the same


def test_a_shard_that_changed_on_the_server(nginx, root, cache):
    shard = write_big_shard(root / "x.tar", count=100, size=50_000)
    source = open_source(f"{nginx.url}/x.tar", cache)
    drop_blocks(cache)
    source.read(0)
    write_big_shard(shard, count=100, size=50_000, seed=1)
    os.utime(shard, (1, 1))
    with pytest.raises(DataError, match=r"x\.tar: changed on the server since it was indexed: expected \d+ bytes"):
        source.read(99)
    again = open_source(f"{nginx.url}/x.tar", cache)
    assert same(again.read(99), open_source(str(shard), cache).read(99))


def test_an_uploaded_index_is_used(nginx, root, cache, tokenizer):
    shard = write_big_shard(root / "x.tar", count=400, size=50_000)
    local = open_source(str(shard), cache, tokenizer)  # leaves its index beside the shard, where the server finds it
    source = open_source(f"{nginx.url}/x.tar", cache, tokenizer)
    fetched = sum(request.bytes for request in nginx.requests() if request.uri == "/x.tar")
    assert fetched <= 2 * BLOCK_BYTES  # its two ends
    np.testing.assert_array_equal(source.shards[0].tokens, local.shards[0].tokens)
    assert all(same(source.read(n), local.read(n)) for n in (0, 200, 399))


def test_an_uploaded_index_of_another_shard_is_not(nginx, root, cache, tokenizer):
    shard = write_big_shard(root / "x.tar", count=4, size=5000)
    index_shard(shard, tokenizer, TEXTS)
    kept = shutil.copytree(index_folder(shard), root / "kept")
    other = write_shard(
        root / "x.tar", [{"__key__": f"{n:04d}", "bin": bytes(5000), "txt": b"other"} for n in (4, 5, 6, 7)]
    )
    assert other.stat().st_size == 51_200 or other.stat().st_size == shard.stat().st_size
    shutil.rmtree(index_folder(shard))
    shutil.copytree(kept, index_folder(shard))
    source = open_source(f"{nginx.url}/x.tar", cache, tokenizer)
    assert [source.read(n).key for n in range(4)] == ["0004", "0005", "0006", "0007"]


@pytest.mark.parametrize("script", [[503, 429, 500], ["cut", "cut"], [503, "cut", 502]])
def test_failures_that_pass(tmp_path, cache, script):
    data = write_shard(tmp_path / "x.tar", make_triples(5)).read_bytes()
    with FlakyServer(data, list(script)) as server:
        (shard,) = expand_shards(server.url, cache)
        with open_shard(shard) as file:
            assert file.read_at(512, len(data) - 512) == data[512:]
        assert server.answers == [*script, "ok"]


def test_an_answer_that_is_always_cut_short(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 1.0)
    data = bytes(10_000)
    with FlakyServer(data, ["cut"] * 20) as server, open_shard(expand_shards(server.url, cache)[0]) as file:
        with pytest.raises(DataError, match=r"x\.tar: offset 0, 10000 bytes: \d attempts .*check the network"):
            file.read_at(0, 100)
        assert len(server.answers) > 1


def test_a_server_that_tells_no_versions(cache):
    with (
        FlakyServer(bytes(1000), [], versions=False) as server,
        pytest.raises(DataError, match=r"x\.tar: the server tells neither ETag nor Last-Modified"),
    ):
        expand_shards(server.url, cache)


def test_names_that_are_no_shards(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch ran", "pipe:curl http://127.0.0.1/x.tar"):
        with pytest.raises(DataError, match="never run programs"):
            expand_shards(name, cache)
    with pytest.raises(DataError, match=r"no shards are read by 'ftp'; known are http://, https://, s3://"):
        expand_shards("ftp://host/x.tar", cache)
    for name in ("simplecache::s3://bucket/x.tar", "filecache::http://host/x.tar", "zip://x.tar::memory://a.zip"):
        with pytest.raises(DataError, match="no shards are read by"):
            expand_shards(name, cache)
    with pytest.raises(DataError, match=r"HTTP servers list no files; .*braces"):
        expand_shards("http://127.0.0.1/x-*.tar", cache)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs:// needs a package .*pip install 'mmctx\[gcs\]'"):
        expand_shards("gs://bucket/x.tar", cache)


def test_file_urls_are_paths(tmp_path, cache):
    shard = write_shard(tmp_path / "x.tar", make_triples(1))
    assert expand_shards(f"file://{tmp_path}/*.tar", cache) == [shard]


def test_memory_urls(tmp_path, cache):
    import fsspec

    data = write_shard(tmp_path / "x.tar", make_triples(4)).read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/remote/x-{n}.tar": data for n in range(2)})
    found = expand_shards("memory://remote/x-*.tar", cache)
    assert found == expand_shards("memory://remote/x-{0..1}.tar", cache)
    assert all(isinstance(shard, RemoteShard) for shard in found)
    source = Source("s", index_shards(found, None, TEXTS), TEXTS)
    assert same(source.read(6), open_source(f"{tmp_path}/x.tar", cache).read(2))
    drop_blocks(cache)
    memory.pipe("/remote/x-1.tar", data[:-512])
    with pytest.raises(DataError, match="changed on the server"):
        source.read(6)
