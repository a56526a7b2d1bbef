"""A folder of media and captions becomes shards that decode to the same pixels, samples and words."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from make_shards import encode_audio, encode_image, random_clip, random_pixels
from PIL import Image
from reading import left_out, read_back, shards_of

from mmctx.datasets.build.folder import build_folder
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import ConfigError, DataError

OPTIONS = BuildOptions(num_workers=1)


def pixels_of(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    return tmp_path / "in"


def test_sidecars_make_pairs_and_triples(folder: Path, tmp_path: Path, tokenizer) -> None:
    red, blue, clip = random_pixels(1, 8, 9), random_pixels(2, 7, 5), random_clip(3, 400)
    (folder / "red.PNG").write_bytes(encode_image(red, "PNG"))
    (folder / "red.txt").write_text("a red thing")
    (folder / "deep" / "er" / "blue.v1.png").write_bytes(encode_image(blue, "PNG"))
    (folder / "deep" / "er" / "blue.v1.WAV").write_bytes(encode_audio(clip, 8000, "WAV", "FLOAT"))
    (folder / "deep" / "er" / "blue.v1.txt").write_text("﻿蓝色", encoding="utf-8")
    (folder / "deep" / "er" / "blue.v1.json").write_text('{"names": {"en": "blue"}}')
    summary = build_folder(folder, tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 2}
    assert (summary["pictures"], summary["clips"], summary["left_out"]) == (2, 1, {})
    found = read_back(shards_of(tmp_path / "out"), tokenizer, ("txt", "json:names.en"))
    assert found.keys() == {"red", "deep/er/blue%2Ev1"}
    pair, triple = found["red"], found["deep/er/blue%2Ev1"]
    assert torch.equal(pair.image.values, pixels_of(red))
    assert tokenizer.decode(pair.texts[0]) == "a red thing"
    assert torch.equal(triple.image.values, pixels_of(blue))
    np.testing.assert_array_equal(triple.audio.values[1:, 0], clip)
    assert [tokenizer.decode(ids) for ids in triple.texts] == ["蓝色", "blue"]


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_other_picture_formats_become_the_same_pixels_in_png(folder, tmp_path, tokenizer, format, mode) -> None:
    picture = Image.fromarray(random_pixels(4, 12, 10)).convert(mode)
    picture.save(folder / f"x.{format.lower()}", format)
    expected = np.array(Image.open(folder / f"x.{format.lower()}").convert("RGB"))
    (folder / "x.txt").write_text("noise")
    build_folder(folder, tmp_path / "out", options=OPTIONS)
    (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
    assert torch.equal(sample.image.values, pixels_of(expected))


def test_transparency_of_a_gif_survives(folder, tmp_path, tokenizer) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((0, 0), 1)
    picture.save(folder / "x.gif", transparency=0)
    (folder / "x.txt").write_text("a dot")
    build_folder(folder, tmp_path / "out", options=OPTIONS)
    (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
    assert sample.image.values[:, 0, 0].tolist() == [200, 100, 50]
    assert (sample.image.values[:, 1:, :] == 255).all()  # laid over white by the decoder


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_aiff_becomes_flac_without_loss(folder, tmp_path, tokenizer, subtype) -> None:
    clip = random_clip(5, 300)
    data = encode_audio(clip, 22050, "AIFF", subtype)
    (folder / "x.aiff").write_bytes(data)
    (folder / "x.txt").write_text("hiss")
    import soundfile

    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    build_folder(folder, tmp_path / "out", options=OPTIONS)
    (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
    assert sample.audio.values[0, 0] == rate
    np.testing.assert_array_equal(sample.audio.values[1:, 0], expected)


def test_every_file_that_goes_missing_is_accounted_for(folder: Path, tmp_path: Path) -> None:
    png = encode_image(random_pixels(1, 4, 4), "PNG")
    files = {
        "good.png": png,
        "good.txt": b"fine",
        "good.webp": encode_image(random_pixels(2, 4, 4), "WEBP"),  # a second picture of the same sample
        "alone.png": png,
        "words.txt": b"no picture",
        "song.m4a": b"\0\0\0 ftypM4A ",
        "broken.jpg": b"\xff\xd8\xff nothing",
        "broken.txt": b"broken",
        "blank.png": png,
        "blank.txt": b" \n",
        "latin.png": png,
        "latin.txt": "café".encode("latin-1"),
        ".DS_Store": b"x",
        "facts.png": png,
        "facts.json": b"{",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    summary = build_folder(folder, tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 1}
    lines = left_out(tmp_path / "out")
    assert {key: reason for key, (reason, _) in lines.items()} == {
        "good.webp": "duplicate_member",
        "alone.png": "no_text",
        "words.txt": "no_media",
        "song.m4a": "unsupported_format",
        "broken": "undecodable_image",
        "blank": "empty",
        "latin": "bad_text",
        ".DS_Store": "hidden",
        "facts": "bad_json",
    }
    assert "ffmpeg" in lines["song.m4a"][1]
    assert sum(summary["left_out"].values()) == len(lines)


def test_links_are_followed_once(folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "a.png").write_bytes(encode_image(random_pixels(1, 4, 4), "PNG"))
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    summary = build_folder(folder, tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 1}
    reasons = {key: reason for key, (reason, _) in left_out(tmp_path / "out").items()}
    assert reasons == {"deep/up": "linked", "gone.png": "unreadable_file"}


@pytest.mark.parametrize("segments", [[{"video": "x"}], {}, []])
def test_broken_documents_are_listed(folder: Path, tmp_path: Path, segments) -> None:
    (folder / "a.png").write_bytes(encode_image(random_pixels(1, 4, 4), "PNG"))
    (folder / "a.txt").write_text("a")
    (folder / "story.json").write_text(json.dumps({"segments": segments}))
    build_folder(folder, tmp_path / "out", options=OPTIONS)
    assert left_out(tmp_path / "out")["story"][0] in ("bad_json", "empty")


def test_names_that_are_no_unicode(folder: Path, tmp_path: Path, tokenizer) -> None:
    name = os.fsencode(folder) + b"/caf\xe9"
    try:
        with open(name + b".png", "wb") as file:
            file.write(encode_image(random_pixels(1, 4, 4), "PNG"))
    except OSError:
        pytest.skip("this file system holds Unicode names only")
    with open(name + b".txt", "wb") as file:
        file.write(b"a cafe")
    build_folder(folder, tmp_path / "out", options=OPTIONS)
    (key,) = read_back(shards_of(tmp_path / "out"), tokenizer)
    assert os.fsencode(key) == b"caf\xe9"
    assert build_folder(folder, tmp_path / "out", options=OPTIONS)["written"] == []


@pytest.mark.parametrize("form", ["captions.csv", "captions.tsv", "metadata.jsonl", "metadata.parquet"])
def test_a_table_of_captions(folder: Path, tmp_path: Path, tokenizer, form: str) -> None:
    for name in ("a.png", "deep/b.png", "unnamed.png"):
        (folder / name).write_bytes(encode_image(random_pixels(len(name), 4, 4), "PNG"))
    rows = [
        {"file_name": "a.png", "text": "first", "label": "one"},
        {"file_name": "a.png", "text": "again", "label": "two"},
        {"file_name": "deep/b.png", "text": "second, with a comma", "label": "three"},
        {"file_name": "gone.png", "text": "third", "label": "four"},
    ]
    if form.endswith("sv"):
        with (folder / form).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if form.endswith("csv") else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif form.endswith("jsonl"):
        (folder / form).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), folder / form)
    build_folder(folder, tmp_path / "out", options=OPTIONS)
    found = read_back(shards_of(tmp_path / "out"), tokenizer, ("txt", "json:label"))
    texts = {key: [tokenizer.decode(ids) for ids in sample.texts] for key, sample in found.items()}
    assert texts == {"a": ["first", "one"], "a~2": ["again", "two"], "deep/b": ["second, with a comma", "three"]}
    assert torch.equal(found["deep/b"].image.values, pixels_of(random_pixels(len("deep/b.png"), 4, 4)))
    reasons = {key: reason for key, (reason, _) in left_out(tmp_path / "out").items()}
    assert reasons == {"gone": "missing_file", "unnamed.png": "no_text"}


def test_rows_whose_files_do_not_fit(folder: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(encode_image(random_pixels(1, 4, 4), "PNG"))
    lines = ["file_name,mask_file_name,text", "a.png,,good", "a.png,b.png,two pictures", "x.m4a,,song", ",,none"]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    summary = build_folder(folder, tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 1}
    reasons = {key: reason for key, (reason, _) in left_out(tmp_path / "out").items()}
    assert reasons == {
        "a~2": "duplicate_member",
        "captions.csv#2: x.m4a": "unsupported_format",
        "captions.csv#3": "no_media",
    }


def test_a_table_without_a_text_column_names_those_it_has(folder: Path, tmp_path: Path) -> None:
    (folder / "captions.csv").write_text("file_name,words\na.png,x\n")
    with pytest.raises(ConfigError, match=r"file_name, words.*--text-column"):
        build_folder(folder, tmp_path / "out", options=OPTIONS)


def test_interleaved_documents(folder: Path, tmp_path: Path, tokenizer) -> None:
    near, far = random_pixels(1, 4, 4), random_pixels(2, 5, 5)
    (folder / "story.0.png").write_bytes(encode_image(near, "PNG"))
    (folder / "deep" / "far.png").write_bytes(encode_image(far, "PNG"))
    segments = [{"text": "see "}, {"image": "0.png"}, {"image": "deep/far.png"}, {"image": "gone.png"}, {"text": "end"}]
    (folder / "story.json").write_text(json.dumps({"segments": segments, "author": "me"}))
    summary = build_folder(folder, tmp_path / "out", options=OPTIONS)
    assert summary["left_out"] == {"missing_file": 1}
    (story,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
    first, *pictures, last = story.segments
    assert (tokenizer.decode(first), tokenizer.decode(last)) == ("see ", "end")
    for picture, expected in zip(pictures, (near, far), strict=True):
        assert torch.equal(picture.values, pixels_of(expected))


def test_nothing_usable_and_no_folder_are_errors(folder: Path, tmp_path: Path) -> None:
    (folder / "x.m4a").write_bytes(b"x")
    with pytest.raises(DataError, match="unsupported_format 1"):
        build_folder(folder, tmp_path / "out", options=OPTIONS)
    with pytest.raises(DataError, match="no such folder"):
        build_folder(tmp_path / "absent", tmp_path / "out", options=OPTIONS)
