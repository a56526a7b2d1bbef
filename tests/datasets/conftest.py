"""Tokenizers small enough to train in milliseconds, and a server of files. Media and shards: `make_shards.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from make_shards import train_tokenizer
from servers import Nginx, find_nginx

from mmctx.datasets.remote.block_cache import BlockCache


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A `TextTokenizer` of 300 entries."""
    from mmctx.tokenizer import TextTokenizer

    return TextTokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300))


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """Another one, whose tokens are bytes."""
    from mmctx.tokenizer import TextTokenizer

    return TextTokenizer(train_tokenizer(tmp_path_factory.mktemp("bytes"), 257))


@pytest.fixture
def root(tmp_path) -> Path:
    """What the server serves."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def cache(tmp_path) -> BlockCache:
    """Where blocks and indexes of remote shards go."""
    return BlockCache.at(str(tmp_path / "cache"), gigabytes=0.5)


@pytest.fixture
def nginx(root, tmp_path) -> Iterator[Nginx]:
    """A server of `root` over HTTP."""
    binary = find_nginx()
    if binary is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    (tmp_path / "nginx").mkdir()
    server = Nginx(binary, root, tmp_path / "nginx")
    server.start()
    yield server
    server.stop()
