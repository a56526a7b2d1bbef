"""Indexes: measures against the decoded media, every defect by its reason, staleness, parallel indexing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from make_shards import (
    area,
    clip_length,
    encode_audio,
    encode_image,
    make_triples,
    random_pixels,
    write_shard,
)

from mmctx.datasets.remote.storage import open_shard
from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.index import expand_shards, index_shard, index_shards
from mmctx.datasets.shards.measure import MemberReader
from mmctx.datasets.shards.sidecar import index_folder
from mmctx.datasets.shards.source import Source
from mmctx.datasets.shards.tar import scan_tar
from mmctx.datasets.shards.tokens import TokenCounter
from mmctx.errors import ConfigError, DataError

TEXTS = ("txt", "json:names.zh", "json:names.fr")


@pytest.fixture
def shard(tmp_path) -> Path:
    return write_shard(tmp_path / "x-0000.tar", make_triples(6))


def test_measures(shard, tokenizer):
    index = index_shard(shard, tokenizer, TEXTS)
    assert index.num_samples == 6
    assert index.problems() == []
    numbers = range(6)
    assert [k.decode() for k in index.keys] == [f"dir/000-{n:05d}" for n in numbers]
    assert index.tokens is not None
    assert index.tokens[:, 0].tolist() == [len(tokenizer.encode(f"caption number {n}")) for n in numbers]
    assert index.tokens[:, 1].tolist() == [len(tokenizer.encode(f"名字{n}")) for n in numbers]
    assert index.tokens[:, 2].tolist() == [-1] * 6
    assert index.media.tolist() == [row for n in numbers for row in ((0, 12, 8 + n), (1, 100 + n, 8000))]


def test_counter_counts_as_the_tokenizer_does(tokenizer):
    texts = ["a caption", "名字 \n", "<|image|> <|endoftext|>", ""]
    counter = pickle.loads(pickle.dumps(TokenCounter.of(tokenizer)))
    assert list(counter.count(texts)) == [len(tokenizer.encode(text)) for text in texts]


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


PNG = encode_image(random_pixels(0, 9, 7), "PNG")
DEFECTS = {
    "undecodable_image": {"jpg": b"no picture", "txt": b"t"},
    "undecodable_audio": {"wav": b"no sound", "txt": b"t"},
    "missing_member": {"json": as_json({"segments": [{"image": "0.png"}, {"image": "1.png"}]}), "0.png": PNG},
    "bad_json": {"json": b"{", "txt": b"t"},
    "bad_text": {"txt": b"\xff\xfe", "png": PNG},
    "empty": {"txt": b" \n", "png": PNG},
    "duplicate_member": {"png": PNG, "jpg": PNG, "txt": b"t"},
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_a_defect_is_flagged_by_its_reason(tmp_path, tokenizer, reason):
    samples = [*make_triples(1), {"__key__": "defect", **DEFECTS[reason]}, *make_triples(1, seed=9)]
    index = index_shard(write_shard(tmp_path / "x.tar", samples), tokenizer, ("txt",))
    source = Source("s", [index], ("txt",))
    flags = source.flags(np.arange(3))
    assert [REASONS[f] for f in flags] == ["ok", reason, "ok"]
    assert [(p.key, p.reason) for p in index.problems()] == [("defect", reason)]
    assert np.flatnonzero(source.flags(np.arange(source.num_samples)) == 0).tolist() == [0, 2]
    assert source.sizes(np.arange(3), area, clip_length).text_tokens.min() >= -1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"segments": []}, "empty"),
        ({"segments": [{"text": " "}]}, "empty"),
        ({"segments": "text"}, "bad_json"),
        ({"segments": ["text"]}, "bad_json"),
        ({"segments": [{"id": 0, "text": "as Whisper writes"}]}, "bad_json"),
        ({"segments": [{"text": 3}]}, "bad_json"),
        ({"caption": 3}, "bad_json"),
        ({"caption": ""}, "empty"),
        ({"other": "neither text nor media"}, "empty"),
    ],
)
def test_malformed_documents(tmp_path, tokenizer, content, reason):
    shard = write_shard(tmp_path / "x.tar", [{"__key__": "k", "json": as_json(content)}])
    index = index_shard(shard, tokenizer, ("json:caption",))
    assert [p.reason for p in index.problems()] == [reason]


def test_an_empty_clip_and_a_bomb(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    samples = [
        {"__key__": "a", "wav": encode_audio(np.zeros(0, np.float32), 8000, "WAV")},
        {"__key__": "b", "png": encode_image(random_pixels(0, 20, 20), "PNG")},
    ]
    index = index_shard(write_shard(tmp_path / "x.tar", samples), tokenizer, ("txt",))
    assert [(p.key, p.reason) for p in index.problems()] == [("a", "empty"), ("b", "undecodable_image")]


def test_parts_of_a_sample_that_do_not_stand_together(tmp_path, tokenizer):
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for extension, data in (("png", PNG), ("txt", b"a text")):
            for key in ("a", "b"):
                writer.write({"__key__": key, extension: data})
    index = index_shard(path, tokenizer, ("txt",))
    assert [(p.key, p.reason) for p in index.problems()] == [(k, "duplicate_key") for k in "abab"]
    assert "tar --sort=name" in index.problems()[0].detail


def test_large_members_are_measured_without_being_read_whole(tmp_path, tokenizer, monkeypatch):
    samples = [
        {"__key__": "a", "png": encode_image(random_pixels(0, 200, 300), "PNG")},
        {"__key__": "b", "flac": encode_audio(np.random.default_rng(0).uniform(-1, 1, 90_000), 8000, "FLAC")},
        {"__key__": "c", "webp": encode_image(random_pixels(0, 200, 300), "WEBP", lossless=True)},
        {"__key__": "d", "mp3": encode_audio(np.sin(np.arange(80_000) / 9), 16000, "MP3")},
        {"__key__": "e", "ogg": encode_audio(np.sin(np.arange(80_000) / 9), 16000, "OGG")},
    ]
    monkeypatch.setattr("mmctx.datasets.shards.measure._SMALL", 4096)
    index = index_shard(write_shard(tmp_path / "x.tar", samples), tokenizer, ("txt",))
    assert index.problems() == []
    rows = [(0, 300, 200), (1, 90_000, 8000), (0, 300, 200), (1, 80_000, 16000), (1, 80_000, 16000)]
    assert index.media.tolist() == rows


def test_a_bad_text_leaves_no_counts(tmp_path, tokenizer):
    samples = [{"__key__": "a", "txt": b"a good text", "json": as_json({"names": ""})}]
    index = index_shard(write_shard(tmp_path / "x.tar", samples), tokenizer, ("txt", "json:names"))
    assert index.tokens is not None
    assert index.tokens.tolist() == [[-1 - REASONS.index("empty"), -1]]


def test_a_member_opened_as_a_file_ends_where_it_ends(tmp_path):
    shard = write_shard(tmp_path / "x.tar", [{"__key__": "a", "bin": bytes(range(250)) * 200, "txt": b"after"}])
    member = next(scan_tar(shard))
    with open_shard(shard) as whole:
        file = MemberReader(whole, str(shard)).open(member)
        assert file.read() == bytes(range(250)) * 200
        assert file.seek(-3, os.SEEK_END) == 49_997
        assert file.read(99) == bytes([247, 248, 249])


def test_no_samples_and_no_media(tmp_path, tokenizer):
    empty = index_shard(write_shard(tmp_path / "empty.tar", []), tokenizer, ("txt",))
    assert (empty.num_samples, len(empty.samples), len(empty.media), len(empty.keys)) == (0, 0, 0, 0)
    text = index_shard(write_shard(tmp_path / "text.tar", [{"__key__": "a", "txt": b"t"}]), tokenizer, ("txt",))
    source = Source("s", [empty, text, empty], ("txt",))
    assert source.sizes(np.array([0]), area, clip_length).image_tokens.tolist() == [0]
    with pytest.raises(DataError, match=r"its 1 shards hold no samples; check data\.sources\.s\.shards"):
        Source("s", [empty], ("txt",))


def test_errors_name_the_remedy(tmp_path, shard, tokenizer):
    with pytest.raises(DataError, match="no such shard"):
        index_shard(tmp_path / "none.tar", tokenizer, ("txt",))
    with pytest.raises(ConfigError, match=r"'json:dotted\.path', found 'text:x'"):
        index_shard(shard, tokenizer, ("text:x",))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[:3000])
    gone = tmp_path / "gone.tar"
    with pytest.raises(DataError, match=r"cut\.tar: offset .*(\n.*){1}gone\.tar: no such shard"):
        index_shards([shard, cut, gone], tokenizer, ("txt",))
    blocked = shutil.copy(shard, tmp_path / "blocked.tar")
    index_folder(blocked).write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"blocked\.tar\.index: cannot be written .*copy them there"):
        index_shard(blocked, tokenizer, ("txt",))


def test_a_pool_makes_the_same_indexes(tmp_path, tokenizer):
    shards = [write_shard(tmp_path / f"x-{n}.tar", make_triples(2 + n, seed=n)) for n in range(3)]
    done: list[tuple[int, int]] = []
    indexes = index_shards(shards, tokenizer, TEXTS, num_workers=2, progress=lambda *counts: done.append(counts))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [index.path for index in indexes] == shards
    for index in indexes:
        alone = index_shard(shutil.copy(index.path, tmp_path / "alone.tar"), tokenizer, TEXTS, force=True)
        for name in ("samples", "media", "keys", "tokens"):
            np.testing.assert_array_equal(getattr(index, name), getattr(alone, name))


def test_workers_need_no_torch():
    code = "import sys, mmctx.datasets.shards.index; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_expand_shards(tmp_path):
    for name in ("x-0008.tar", "x-0009.tar", "x-0010.tar", "y.tar"):
        (tmp_path / name).touch()
    (tmp_path / "x-0008.tar.index").mkdir()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand_shards(f"{tmp_path}/{pattern}")]

    assert names("x-{0008..0010}.tar") == names("x-*.tar") == ["x-0008.tar", "x-0009.tar", "x-0010.tar"]
    assert names("{y,x-0008}.tar") == ["y.tar", "x-0008.tar"]
    assert names("{*,y}.tar")[-1] == "y.tar"
    assert len(names("{*,y}.tar")) == 4
    assert names("y.tar") == ["y.tar"]
    with pytest.raises(DataError, match=r"z-\*\.tar: matches no file; folder .* holds 5 entries, 4 of them \.tar"):
        names("z-*.tar")
    with pytest.raises(DataError, match=r"2 of 4 names match no file, first .*x-0011\.tar"):
        names("x-{0009..0012}.tar")
    with pytest.raises(DataError, match="does not exist"):
        names("none/x.tar")


def test_codes_of_reasons_never_move():
    assert REASONS[:5] == ("ok", "undecodable_image", "undecodable_audio", "missing_member", "bad_json")
