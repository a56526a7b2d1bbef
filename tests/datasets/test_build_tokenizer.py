"""A tokenizer of the texts of shards: all declared ones, those of interleaved documents, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import png, write_shard
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.datasets.build.tokenizer import build_tokenizer
from mmctx.errors import ConfigError, DataError
from mmctx.tokenizer import TextTokenizer


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    pairs = [
        {"__key__": f"p{n}", "txt": b"zebra", "json": json.dumps({"names": {"fr": "zèbre"}}).encode()} for n in range(3)
    ]
    pairs.append({"__key__": "hidden", "html": b"quagga quagga", "txt": b"zebra"})
    segments = [{"text": "okapi"}, {"image": "0.png"}, {"text": "okapi"}]
    books = [{"__key__": "b", "0.png": png(1), "json": json.dumps({"segments": segments}).encode()}]
    books.append({"__key__": "bad", "json": b"{"})
    return [str(write_shard(tmp_path / "pairs.tar", pairs)), str(write_shard(tmp_path / "books.tar", books))]


def words_of(folder: Path) -> list[int]:
    """How many tokens each word takes; one where it was learnt."""
    tokenizer = TextTokenizer(folder)
    return [len(tokenizer.encode(word)) for word in ("zebra", "zèbre", "okapi", "quagga")]


def test_texts_that_are_declared(shards: list[str], tmp_path: Path) -> None:
    answer = build_tokenizer(tmp_path / "both", shards, texts=("txt", "json:names.fr"), vocab_size=300)
    assert answer["texts"] == 3 + 1 + 3 + 2
    assert answer["left_out"] == 1
    assert answer["entries"] <= 300
    assert words_of(tmp_path / "both") == [1, 1, 1, 6]
    build_tokenizer(tmp_path / "one", shards[:1], vocab_size=300)
    zebra, french, okapi, _ = words_of(tmp_path / "one")
    assert zebra == 1
    assert french > 1
    assert okapi > 1
    tokenizer = TextTokenizer(tmp_path / "one")
    assert tokenizer.decode(tokenizer.encode("  Größe 大 \n")) == "  Größe 大 \n"  # any text comes back


def test_the_same_shards_give_the_same_tokenizer(shards: list[str], tmp_path: Path) -> None:
    for name in "ab":
        build_tokenizer(tmp_path / name, shards, vocab_size=280)
    assert TextTokenizer(tmp_path / "a").fingerprint == TextTokenizer(tmp_path / "b").fingerprint


def test_by_command(shards: list[str], tmp_path: Path) -> None:
    arguments = ["data", "tokenizer", str(tmp_path / "t"), *shards, "--vocab-size", "300", "--text", "txt", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["texts"] == 6
    assert words_of(tmp_path / "t")[0] == 1


def test_what_cannot_be(shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 257"):
        build_tokenizer(tmp_path / "t", shards, vocab_size=256)
    with pytest.raises(DataError, match="hold no text"):
        build_tokenizer(tmp_path / "t", shards[:1], texts=("json:names.de",))
    with pytest.raises(DataError, match="absent"):
        build_tokenizer(tmp_path / "t", [str(tmp_path / "absent.tar")])
    assert not (tmp_path / "t").exists()
