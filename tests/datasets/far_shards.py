"""What tests of remote shards share: shards of many blocks, sources over them, and how their samples compare."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from make_shards import write_shard

from mmctx.datasets.remote.block_cache import BlockCache
from mmctx.datasets.shards.index import expand_shards, index_shards
from mmctx.datasets.shards.source import RawSample, Source

TEXTS = ("txt", "json:names.zh")


def write_big_shard(path: Path, count: int, size: int, seed: int = 0) -> Path:
    """`count` samples of a text and `size` random bytes."""
    rng = np.random.default_rng(seed)
    samples = [{"__key__": f"{n:04d}", "bin": rng.bytes(size), "txt": f"text {n}".encode()} for n in range(count)]
    return write_shard(path, samples)


def open_source(pattern: str, cache: BlockCache, tokenizer=None) -> Source:
    return Source("s", index_shards(expand_shards(pattern, cache), tokenizer, TEXTS), TEXTS)


def drop_blocks(cache: BlockCache) -> None:
    """As if all blocks had been evicted."""
    shutil.rmtree(Path(cache.folder, "blocks"), ignore_errors=True)


def same(a: RawSample, b: RawSample) -> bool:
    return (a.key, a.members) == (b.key, b.members)
