"""Documents of OBELICS, MMC4 and Megatron-Energon come out with the same texts and pixels in the same order."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from make_shards import encode_audio, encode_image, random_clip, random_pixels, write_shard
from reading import left_out, read_back, shards_of

from mmctx.datasets.build.convert import convert
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import ConfigError, DataError
from mmctx.sample import Sample

OPTIONS = BuildOptions(num_workers=1, samples_per_shard=2)


def png(number: int) -> bytes:
    return encode_image(random_pixels(number, 4, 5), "PNG")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(sample: Sample, expected: list[str | int], tokenizer) -> None:
    """`expected` holds texts and, for a picture, the number it was drawn from."""
    assert sample.segments is not None
    assert len(sample.segments) == len(expected)
    for found, wanted in zip(sample.segments, expected, strict=True):
        if isinstance(wanted, int):
            assert torch.equal(found.values, torch.from_numpy(random_pixels(wanted, 4, 5)).permute(2, 0, 1))
        else:
            assert tokenizer.decode(found) == wanted


class TestObelics:
    RECORDS = (
        {
            "images": [None, "https://a.org/p/1.png", None, "https://b.org/p/1.png", None],
            "texts": ["one", None, "two", None, "three"],
            "metadata": "[]",
        },
        {"images": ["https://gone.org/x.png", None], "texts": [None, "words"]},
        {"images": ["https://gone.org/y.png"], "texts": [None]},
        {"images": [None], "texts": []},
    )

    def test_addresses_are_found_by_host_and_path(self, tmp_path: Path, tokenizer) -> None:
        for number, host in enumerate(("a.org", "b.org")):  # one name, two pictures
            (tmp_path / "pictures" / host / "p").mkdir(parents=True)
            (tmp_path / "pictures" / host / "p" / "1.png").write_bytes(png(number))
        source = write_lines(tmp_path / "docs.jsonl", list(self.RECORDS))
        summary = convert("obelics", [source], tmp_path / "out", images=[tmp_path / "pictures"], options=OPTIONS)
        assert summary["counts"] == {"train": 2}
        found = read_back(shards_of(tmp_path / "out"), tokenizer)
        check(found["docs-00000000"], ["one\n\n", 0, "two\n\n", 1, "three"], tokenizer)
        check(found["docs-00000001"], ["words"], tokenizer)
        assert summary["left_out"] == {"missing_file": 2, "bad_row": 1, "empty": 1}
        lines = left_out(tmp_path / "out")
        assert "gone.org/x.png" in lines["docs-00000001"][1]
        assert "1 images, 0 texts" in lines[f"{source}#3"][1]
        assert (
            convert("obelics", [source], tmp_path / "out", images=[tmp_path / "pictures"], options=OPTIONS)["written"]
            == []
        )

    def test_a_table_of_addresses(self, tmp_path: Path, tokenizer) -> None:
        (tmp_path / "x7.png").write_bytes(png(0))
        (tmp_path / "map.csv").write_text("url,file\nhttps://a.org/p/1.png,x7.png\n")
        source = write_lines(tmp_path / "docs.jsonl", [self.RECORDS[0]])
        options = {"images": [tmp_path], "addresses": tmp_path / "map.csv"}
        convert("obelics", [source], tmp_path / "out", options=OPTIONS, **options)
        (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
        check(sample, ["one\n\n", 0, "two\n\nthree"], tokenizer)

    def test_bytes_in_parquet_and_facts(self, tmp_path: Path, tokenizer) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        rows = [{"images": [png(3), None, png(4)], "texts": [None, "between", None], "url": "https://a.org"}]
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / "docs.parquet")
        convert("obelics", [tmp_path / "docs.parquet"], tmp_path / "out", options=OPTIONS)
        (shard,) = shards_of(tmp_path / "out")
        check(*read_back([shard], tokenizer).values(), [3, "between", 4], tokenizer)
        with tarfile.open(shard) as tar:
            document = json.load(tar.extractfile("docs-00000000.json"))  # type: ignore[arg-type]
        assert document["url"] == "https://a.org"


MMC4_RECORD = {
    "text_list": ["zero.", "one.", "two."],
    "image_info": [
        {"image_name": "c.png", "matched_text_index": 2, "raw_url": "https://a.org/c.png"},
        {"image_name": "a.png", "matched_text_index": 0, "raw_url": "https://a.org/a.png"},
        {"image_name": "gone.png", "matched_text_index": 1, "raw_url": "https://a.org/gone.png"},
        {"image_name": "b.png", "matched_text_index": 9, "raw_url": "https://a.org/b.png"},
    ],
    "similarity_matrix": [[0.1, 0.2, 0.3]],
}


class TestMmc4:
    @pytest.fixture(params=["folder", "tar"])
    def pictures(self, tmp_path: Path, request) -> Path:
        (tmp_path / "pictures").mkdir()
        for number, name in enumerate("abc"):
            (tmp_path / "pictures" / f"{name}.png").write_bytes(png(number))
        if request.param == "folder":
            return tmp_path / "pictures"
        with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
            tar.add(tmp_path / "pictures", ".")
        return tmp_path / "pictures.tar"

    @pytest.mark.parametrize(
        ("after", "expected"), [(False, [0, "zero. one. ", 2, "two."]), (True, ["zero. ", 0, "one. two.", 2])]
    )
    def test_pictures_stand_beside_their_texts(self, tmp_path, pictures, tokenizer, after, expected) -> None:
        source = write_lines(tmp_path / "docs.jsonl", [MMC4_RECORD])
        summary = convert(
            "mmc4", [source], tmp_path / "out", images=[pictures], image_after_text=after, options=OPTIONS
        )
        (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
        check(sample, expected, tokenizer)
        assert summary["left_out"] == {"bad_place": 1, "missing_file": 1}

    def test_pictures_inside_the_records(self, tmp_path: Path, tokenizer) -> None:
        info = {"image_base64": base64.b64encode(png(5)).decode(), "matched_text_index": 1}
        source = write_lines(tmp_path / "docs.jsonl", [{"text_list": ["a", "b"], "image_info": [info]}])
        convert("mmc4", [source], tmp_path / "out", options=OPTIONS)
        (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
        check(sample, ["a ", 5, "b"], tokenizer)


class TestEnergon:
    def samples(self) -> list[dict[str, Any]]:
        lists = {"images": [None, "2345ew.png", None, None], "texts": ["before ", None, None, "after"]}
        audios = {"audios": [None, None, "x.wav", None], "source": "web"}
        missing = {"images": ["nope.png", "here.png"], "texts": [None, None]}
        clip = encode_audio(random_clip(3, 60), 8000, "WAV", "FLOAT")
        return [
            {"__key__": "s1", "json": json.dumps(lists | audios).encode(), "2345ew.png": png(1), "x.wav": clip},
            {"__key__": "s2", "json": json.dumps(missing).encode(), "here.png": png(2), "spare.png": png(3)},
            {"__key__": "s3", "png": png(4), "txt": b"a plain pair"},
            {"__key__": "s4", "json": json.dumps({"images": [None], "texts": [" "]}).encode()},
        ]

    def test_documents_and_plain_samples(self, tmp_path: Path, tokenizer) -> None:
        source = write_shard(tmp_path / "in.tar", self.samples())
        summary = convert("energon", [source], tmp_path / "out", options=OPTIONS)
        found = read_back(shards_of(tmp_path / "out"), tokenizer)
        assert found.keys() == {"s1", "s2", "s3"}
        before, picture, clip, after = found["s1"].segments
        assert (tokenizer.decode(before), tokenizer.decode(after)) == ("before ", "after")
        assert torch.equal(picture.values, torch.from_numpy(random_pixels(1, 4, 5)).permute(2, 0, 1))
        np.testing.assert_array_equal(clip.values[1:, 0], random_clip(3, 60))
        check(found["s2"], [2], tokenizer)
        assert tokenizer.decode(found["s3"].texts[0]) == "a plain pair"
        assert summary["left_out"] == {"empty": 1, "missing_member": 1, "unused": 1}

    def test_its_own_split_is_kept(self, tmp_path: Path, tokenizer) -> None:
        folder = tmp_path / "in"
        (folder / ".nv-meta").mkdir(parents=True)
        (folder / "shards").mkdir()
        for number, name in enumerate(("train", "val", "bad")):
            samples = [{"__key__": f"{name}{n}", "txt": f"{name} {n}".encode()} for n in range(number + 2)]
            write_shard(folder / "shards" / f"{name}.tar", samples)
        split = {"train": ["shards/train.tar"], "val": ["shards/val.tar"], "test": []}
        record = {"exclude": ["shards/bad.tar", "shards/val.tar/val1"], "split_parts": split}
        (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(record))
        summary = convert("energon", [folder], tmp_path / "out", options=OPTIONS)
        assert summary["counts"] == {"train": 2, "val": 2}
        assert read_back(shards_of(tmp_path / "out", "val"), tokenizer).keys() == {"val0", "val2"}
        assert summary["left_out"] == {"excluded": 2}
        split["train"].append("shards/gone.tar")
        (folder / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(record))
        with pytest.raises(DataError, match=r"gone\.tar"):
            convert("energon", [folder], tmp_path / "out", options=OPTIONS)


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"obelics, mmc4, energon.*'laion'"):
        convert("laion", [tmp_path], tmp_path / "out", options=OPTIONS)
    with pytest.raises(DataError, match="holds none of"):
        convert("obelics", [tmp_path], tmp_path / "out", options=OPTIONS)
    with pytest.raises(DataError, match=r"holds no \.tar"):
        convert("energon", [tmp_path], tmp_path / "out", options=OPTIONS)
    source = write_lines(tmp_path / "x.jsonl", [{"texts": ["x"], "images": [None]}])
    with pytest.raises(DataError, match="no such folder or tar of pictures"):
        convert("obelics", [source], tmp_path / "out", images=[tmp_path / "absent"], options=OPTIONS)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", [{"texts": ["x", None], "images": [None, "gone.png"]}])
    command = [sys.executable, "-m", "mmctx.cli", "data", "convert", "obelics", str(tmp_path / "out"), str(source)]
    done = subprocess.run([*command, "--workers", "1", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(io.StringIO(done.stdout).read())
    assert answer["counts"] == {"train": 1}
    assert answer["left_out"] == {"missing_file": 1}
