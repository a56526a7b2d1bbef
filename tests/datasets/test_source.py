"""A source over many shards against the webdataset library; shards that changed under it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import webdataset
from make_shards import area, clip_length, make_document, make_triples, write_shard

from mmctx.datasets.shards.index import index_shard, index_shards
from mmctx.datasets.shards.source import Source
from mmctx.datasets.shards.summary import summarise
from mmctx.errors import DataError

TEXTS = ("txt", "json:names.zh", "json:names.fr")


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_shard(tmp_path / "x.tar", make_triples(6))


def test_interleaved_document(tmp_path, tokenizer):
    shard = write_shard(tmp_path / "x.tar", [*make_triples(2), make_document()])
    source = Source("s", [index_shard(shard, tokenizer, ("txt", "json:names.en"))], ("txt", "json:names.en"))
    sizes = source.sizes(np.array([2, 0]), area, clip_length)
    texts = ("first a picture ", "then a sound ", "the end")
    assert sizes.interleaved.tolist() == [True, False]
    assert sizes.text_tokens[0].tolist() == [sum(len(tokenizer.encode(t)) for t in texts), -1]
    assert sizes.image_tokens.tolist() == [20 * 10 + 40 * 30, 12 * 8]
    assert sizes.audio_tokens.tolist() == [160, 100]


def test_source_over_many_shards(tmp_path, tokenizer):
    shards = [write_shard(tmp_path / f"x-{n}.tar", make_triples(3 + n, seed=n)) for n in range(3)]
    source = Source("s", index_shards(shards, tokenizer, TEXTS), TEXTS)
    assert source.num_samples == 12
    ids = np.random.default_rng(0).permutation(12)
    sizes = source.sizes(ids, area, clip_length)
    every = source.sizes(np.arange(12), area, clip_length)
    for name in ("text_tokens", "image_tokens", "audio_tokens", "interleaved"):
        np.testing.assert_array_equal(getattr(sizes, name), getattr(every, name)[ids])
    locals_ = np.array([n for count in (3, 4, 5) for n in range(count)])
    assert every.image_tokens.tolist() == (12 * (8 + locals_)).tolist()
    assert every.audio_tokens.tolist() == (100 + locals_).tolist()
    expected = [s for shard in shards for s in webdataset.WebDataset(str(shard), shardshuffle=False)]
    for number in ids:
        raw = source.read(int(number))
        other = expected[number]
        assert source.locate(int(number)) == (Path(raw.shard), raw.key)
        assert (raw.key, raw.shard) == (other["__key__"], other["__url__"])
        assert raw.members == {k: v for k, v in other.items() if not k.startswith("__")}
    for wrong in (-1, 12):
        with pytest.raises(IndexError, match=r"0\.\.11"):
            source.read(wrong)
        with pytest.raises(IndexError, match=r"0\.\.11"):
            source.flags(np.array([wrong]))


def test_source_can_be_pickled_after_reading(shard, tokenizer):
    source = Source("s", [index_shard(shard, tokenizer, ("txt",))], ("txt",))
    raw = source.read(3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(3).members == raw.members
    assert len(pickle.dumps(source)) < 2000


def test_open_files_are_bounded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("mmctx.datasets.shards.source._OPEN_FILES", 2)
    shards = [write_shard(tmp_path / f"x-{n}.tar", make_triples(1, seed=n)) for n in range(4)]
    source = Source("s", index_shards(shards, tokenizer, ("txt",)), ("txt",))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [source.read(n).key for n in range(4)] == [f"dir/00{n}-00000" for n in range(4)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 2 * 4  # and two mapped arrays of each shard


def test_a_shard_that_changed_under_the_index(shard, tokenizer):
    source = Source("s", [index_shard(shard, tokenizer, ("txt",))], ("txt",))
    whole = shard.read_bytes()
    write_shard(shard, make_triples(6, seed=7))
    with pytest.raises(DataError, match=r"expected members of 'dir/000-00000', found .*mmctx data index --force"):
        source.read(0)
    shard.write_bytes(whole[:9000])
    with pytest.raises(DataError, match=r"should have \d+ bytes, found \d+; .*mmctx data index --force"):
        source.read(5)
    shard.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_summary(tmp_path, tokenizer):
    shard = write_shard(tmp_path / "x.tar", [*make_triples(4), {"__key__": "bad", "png": b"no picture"}])
    summary = summarise([index_shard(shard, tokenizer, ("txt",))])
    assert {k: summary[k] for k in ("shards", "samples", "usable", "pictures", "clips")} == {
        "shards": 1,
        "samples": 5,
        "usable": 4,
        "pictures": 4,
        "clips": 4,
    }
    assert summary["problems"] == {"undecodable_image": 1}
    assert summary["text tokens"] == sum(len(tokenizer.encode(f"caption number {n}")) for n in range(4))
    assert summary["hours of sound"] == pytest.approx((100 + 101 + 102 + 103) / 8000 / 3600)


def test_sizes_need_a_tokenizer(shard):
    source = Source("s", [index_shard(shard, None, ("txt",))], ("txt",))
    assert source.flags(np.arange(6)).tolist() == [0] * 6
    with pytest.raises(DataError, match="indexed without a tokenizer"):
        source.sizes(np.arange(6), area, clip_length)
