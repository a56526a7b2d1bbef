"""Shards in a bucket, from an S3-compatible server on loopback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_shards import make_triples, write_shard

from mmctx.datasets.remote.block_cache import BlockCache
from mmctx.datasets.shards.index import expand_shards, index_shards
from mmctx.datasets.shards.source import Source
from mmctx.errors import DataError

moto = pytest.importorskip("moto.server", reason="needs moto[server]")
s3fs = pytest.importorskip("s3fs", reason="needs the extra `remote`")
TEXTS = ("txt",)


@pytest.fixture(scope="module")
def server():
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """A client that writes to ``bucket``; what reads shards finds the server as users tell it: by the environment."""
    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)


@pytest.fixture
def cache(tmp_path) -> BlockCache:
    return BlockCache.at(str(tmp_path / "cache"), gigabytes=0.5)


@pytest.fixture
def shards(bucket, tmp_path) -> list[Path]:
    """Local copies of ``bucket/train/x-{0..2}.tar``."""
    found = [write_shard(tmp_path / f"x-{n}.tar", make_triples(2 + n, seed=n)) for n in range(3)]
    for path in found:
        bucket.pipe(f"bucket/train/{path.name}", path.read_bytes())
    return found


def drop_blocks(cache: BlockCache) -> None:
    for block in Path(cache.folder, "blocks").glob("*/*"):
        block.unlink()


def test_samples_of_a_bucket(shards, tmp_path, cache, tokenizer):
    found = expand_shards("s3://bucket/train/x-*.tar", cache)
    assert [str(shard) for shard in found] == [f"s3://bucket/train/x-{n}.tar" for n in range(3)]
    assert expand_shards("s3://bucket/train/x-{0..2}.tar", cache) == found
    far = Source("s", index_shards(found, tokenizer, TEXTS), TEXTS)
    near = Source("s", index_shards(shards, tokenizer, TEXTS), TEXTS)
    assert [a.content_hash for a in far.shards] == [b.content_hash for b in near.shards]
    drop_blocks(cache)
    far.prefetch(range(far.num_samples))
    for number in np.random.default_rng(0).permutation(9).tolist():
        a, b = far.read(number), near.read(number)
        assert (a.key, a.members) == (b.key, b.members)


def test_an_index_in_the_bucket_is_used(shards, bucket, cache, tokenizer):
    index_shards(shards, tokenizer, TEXTS)
    for path in shards:
        bucket.put(f"{path}.index", f"bucket/train/{path.name}.index", recursive=True)
    indexes = index_shards(expand_shards("s3://bucket/train/x-*.tar", cache), tokenizer, TEXTS)
    for index, path in zip(indexes, shards, strict=True):
        (copied,) = Path(cache.folder, "indexes").glob(f"{path.name}-*.index")
        assert '"uploaded": true' in (copied / "meta.json").read_text()
        assert index.tokens is not None


def test_an_object_that_changed(shards, bucket, cache):
    source = Source("s", index_shards(expand_shards("s3://bucket/train/x-0.tar", cache), None, TEXTS), TEXTS)
    source.read(0)
    drop_blocks(cache)
    source.read(0)  # this process has the object open
    changed = bytearray(shards[0].read_bytes())
    changed[600] ^= 1
    bucket.pipe("bucket/train/x-0.tar", bytes(changed))
    drop_blocks(cache)
    with pytest.raises(DataError, match=r"s3://bucket/train/x-0\.tar: changed on the server since it was indexed"):
        source.read(1)


def test_what_is_not_there(shards, cache):
    with pytest.raises(DataError, match=r"s3://bucket/train/x-9\.tar: 1 attempt .*check the url"):
        expand_shards("s3://bucket/train/x-9.tar", cache)
    with pytest.raises(DataError, match=r"matches no file; check the pattern"):
        expand_shards("s3://bucket/train/y-*.tar", cache)
    with pytest.raises(DataError, match=r"s3://none/x\.tar: 1 attempt"):
        expand_shards("s3://none/x.tar", cache)
