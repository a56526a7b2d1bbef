"""Hashes that name the content of a shard, wherever it lies, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mmctx.datasets.remote.storage import Shard, map_file
from mmctx.datasets.shards.tar import TarMember

_HASHED_ENDS = 1 << 16


def content_hash(path: Shard, members: Sequence[TarMember]) -> str:
    """Names the content: both ends of the file and every header (names, sizes and times), not all of the data."""
    digest = hashlib.blake2b(digest_size=16)
    with map_file(path) as buffer:
        digest.update(buffer[:_HASHED_ENDS])
        digest.update(buffer[-_HASHED_ENDS:])
        for member in members:
            digest.update(buffer[member.header : member.offset])
    return digest.hexdigest()


def ends_hash(path: Shard) -> str:
    """Names the content by both ends of the file alone: two reads, where a remote shard's every header would be too many."""
    with map_file(path) as buffer:
        return hashlib.blake2b(buffer[:_HASHED_ENDS] + buffer[-_HASHED_ENDS:], digest_size=16).hexdigest()
