"""Reads built shards back the way training does: index, source, decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmctx.datasets.decode import decode_sample
from mmctx.datasets.shards.index import index_shards
from mmctx.datasets.shards.source import Source
from mmctx.pack import MediaItem
from mmctx.sample import Sample


def raw_item(kind: str):
    """A preprocessor that keeps decoded values as they are."""

    def image(pixels: Tensor) -> MediaItem:
        return MediaItem(kind="image", values=pixels, num_tokens=1)

    def audio(clip: Tensor, rate: int) -> MediaItem:
        return MediaItem(kind="audio", values=torch.cat([torch.tensor([float(rate)]), clip])[:, None], num_tokens=1)

    return image if kind == "image" else audio


def read_back(shards: list[Path], tokenizer: Any, texts: tuple[str, ...] = ("txt",)) -> dict[str, Sample]:
    """Every sample by key, decoded; fails on the first that the index or the decoder refuses.

    An image is (3, H, W) uint8; a clip is (1 + n, 1): its rate and then its values.
    """
    indexes = index_shards(shards, tokenizer, texts)
    assert not [problem for index in indexes for problem in index.problems()]
    source = Source("built", indexes, texts)
    found = {}
    for number in range(source.num_samples):
        raw = source.read(number)
        found[raw.key] = decode_sample(
            raw,
            source="built",
            uid=number,
            texts=texts,
            tokenizer=tokenizer,
            make_image=raw_item("image"),
            make_audio=raw_item("audio"),
        )
    assert len(found) == source.num_samples
    return found


def shards_of(out: Path, split: str = "train") -> list[Path]:
    """The shards of one split, in order."""
    return sorted((out / split).glob("*.tar"))


def left_out(out: Path) -> dict[str, tuple[str, str]]:
    """Key -> (reason, detail) of ``left_out.jsonl``."""
    lines = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    return {line["key"]: (line["reason"], line["detail"]) for line in lines}


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder, but for what an index leaves."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
