"""Tokenizers small enough to train in milliseconds. Media and shards: `make_shards.py`."""

from __future__ import annotations

import pytest
from make_shards import train_tokenizer


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
