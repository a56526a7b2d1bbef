"""What Hugging Face's library saves comes back as it was put in, without decoding media on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_shards import encode_audio, encode_image, random_clip, random_pixels
from reading import left_out, read_back, shards_of

from mmctx.datasets.build.hf import build_hf
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import DataError

hf = pytest.importorskip("datasets", reason="needs pip install 'mmctx[hf]'")

OPTIONS = BuildOptions(num_workers=1, samples_per_shard=3)
ROOT = Path(__file__).parents[2]


def make_dataset(count: int, seed: int = 0):
    """Pictures, clips, captions and a class label."""
    rows = {
        "picture": [{"bytes": encode_image(random_pixels(seed + n, 5, 6), "PNG"), "path": None} for n in range(count)],
        "clip": [
            {"bytes": encode_audio(random_clip(seed + n, 80), 8000, "WAV", "FLOAT"), "path": None} for n in range(count)
        ],
        "caption": [f"caption {seed + n}" for n in range(count)],
        "label": [n % 2 for n in range(count)],
    }
    data = hf.Dataset.from_dict(rows)
    types = {"picture": hf.Image(), "clip": hf.Audio(), "label": hf.ClassLabel(names=["cat", "dog"])}
    for name, kind in types.items():  # cast, not encoded: that would ask for a decoder of sound
        data = data.cast_column(name, kind)
    return data


def check(found, count: int, tokenizer, prefix: str, seed: int = 0) -> None:
    assert found.keys() == {f"{prefix}-{n:08d}" for n in range(count)}
    for n in range(count):
        sample = found[f"{prefix}-{n:08d}"]
        assert [tokenizer.decode(ids) for ids in sample.texts] == [f"caption {seed + n}", ["cat", "dog"][n % 2]]
        assert torch.equal(sample.image.values, torch.from_numpy(random_pixels(seed + n, 5, 6)).permute(2, 0, 1))
        np.testing.assert_array_equal(sample.audio.values[1:, 0], random_clip(seed + n, 80))


TEXTS = ("txt", "json:label")


def test_one_dataset(tmp_path: Path, tokenizer) -> None:
    make_dataset(7).save_to_disk(tmp_path / "in")
    summary = build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 7}
    assert summary["columns"] == {"image": "picture", "audio": "clip", "text": "caption"}
    check(read_back(shards_of(tmp_path / "out"), tokenizer, TEXTS), 7, tokenizer, "row")
    assert build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)["written"] == []


def test_splits_stay_as_they_are(tmp_path: Path, tokenizer) -> None:
    hf.DatasetDict(train=make_dataset(5), test=make_dataset(2, seed=50)).save_to_disk(tmp_path / "in")
    summary = build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 5, "test": 2}
    check(read_back(shards_of(tmp_path / "out", "train"), tokenizer, TEXTS), 5, tokenizer, "train")
    check(read_back(shards_of(tmp_path / "out", "test"), tokenizer, TEXTS), 2, tokenizer, "test", seed=50)


def test_a_filtered_dataset_gives_its_rows_alone(tmp_path: Path, tokenizer) -> None:
    make_dataset(6).select([5, 1, 3]).save_to_disk(tmp_path / "in")
    build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)
    found = read_back(shards_of(tmp_path / "out"), tokenizer, TEXTS)
    assert [tokenizer.decode(s.texts[0]) for s in found.values()] == ["caption 5", "caption 1", "caption 3"]


def test_a_folder_of_parquet_as_on_the_hub(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    make_dataset(4).to_parquet(tmp_path / "in" / "data" / "train-00000-of-00001.parquet")
    make_dataset(3, seed=50).to_parquet(tmp_path / "in" / "data" / "validation-00000-of-00001-ab12.parquet")
    summary = build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 4, "validation": 3}
    check(read_back(shards_of(tmp_path / "out", "validation"), tokenizer, TEXTS), 3, tokenizer, "validation", seed=50)


def test_text_alone(tmp_path: Path, tokenizer) -> None:
    hf.Dataset.from_dict({"text": ["one", "", "three"], "n": [1, 2, 3]}).save_to_disk(tmp_path / "in")
    build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)
    found = read_back(shards_of(tmp_path / "out"), tokenizer)
    assert [tokenizer.decode(sample.texts[0]) for sample in found.values()] == ["one", "three"]
    assert left_out(tmp_path / "out")["row-00000001"][0] == "empty"


def test_sequences_of_pictures_make_documents(tmp_path: Path, tokenizer) -> None:
    cells = [[{"bytes": encode_image(random_pixels(n, 4, 4), "PNG"), "path": None} for n in range(3)]]
    features = hf.Features(images=hf.Sequence(hf.Image()), text=hf.Value("string"))
    hf.Dataset.from_dict({"images": cells, "text": ["three"]}, features=features).save_to_disk(tmp_path / "in")
    build_hf(tmp_path / "in", tmp_path / "out", options=OPTIONS)
    (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
    *pictures, text = sample.segments
    for n, picture in enumerate(pictures):
        assert torch.equal(picture.values, torch.from_numpy(random_pixels(n, 4, 4)).permute(2, 0, 1))
    assert tokenizer.decode(text) == "three"


def test_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Hugging Face dataset"):
        build_hf(tmp_path, tmp_path / "out", options=OPTIONS)
    with pytest.raises(DataError, match="no such folder"):
        build_hf(tmp_path / "absent", tmp_path / "out", options=OPTIONS)


@pytest.mark.slow
def test_from_the_root_of_the_repository_the_library_is_found_not_our_folder(tmp_path: Path) -> None:
    make_dataset(2).save_to_disk(tmp_path / "in")
    command = [sys.executable, "-m", "mmctx.cli", "data", "build", "hf", str(tmp_path / "out"), str(tmp_path / "in")]
    done = subprocess.run([*command, "--workers", "1", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(shards_of(tmp_path / "out")) == 1
