"""A tiny real corpus (pictures, clips, texts, interleaved documents in real tars) and a tiny real run over it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "red",
    "green",
    "blue",
    "round",
    "square",
    "tall",
    "small",
    "big",
    "cat",
    "dog",
    "house",
    "tree",
    "moon",
    "star",
    "fish",
    "bird",
]


def png(seed: int, size: int = 32) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def flac(seed: int, seconds: float = 0.3, rate: int = 16_000) -> bytes:
    """A clip: a tone and noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * (seed % 20)) * time) + 0.05 * rng.standard_normal(len(time))
    out = io.BytesIO()
    soundfile.write(out, wave.astype(np.float32), rate, format="FLAC")
    return out.getvalue()


def words(seed: int, count: int = 3) -> str:
    """A text."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def triple(seed: int) -> dict[str, Any]:
    """A picture, a clip and two texts."""
    text = words(seed, 2 + seed % 5)
    return {
        "__key__": f"triple{seed:04d}",
        "png": png(seed),
        "flac": flac(seed, 0.2 + 0.05 * (seed % 7)),
        "txt": text.encode(),
        "json": json.dumps({"names": {"other": text[::-1]}}).encode(),
    }


def book(seed: int) -> dict[str, Any]:
    """An interleaved document of a few segments."""
    sample: dict[str, Any] = {"__key__": f"book{seed:04d}"}
    segments: list[dict[str, str]] = []
    for number in range(3 + seed % 5):
        kind = ("text", "image", "audio")[(number + seed) % 3]
        if kind == "text":
            segments.append({"text": words(100 * seed + number, 4)})
        else:
            extension = {"image": "png", "audio": "flac"}[kind]
            maker = {"image": png, "audio": flac}[kind]
            sample[f"{number}.{extension}"] = maker(100 * seed + number)
            segments.append({kind: f"{number}.{extension}"})
    segments.append({"text": words(seed, 3)})
    return sample | {"json": json.dumps({"segments": segments}).encode()}


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    """A real tar, written by the webdataset library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def make_tokenizer(folder: Path) -> Path:
    """A byte-level BPE over the corpus' words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([words(seed, 8) for seed in range(200)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(str(folder))
    return folder


def make_corpus(root: Path, num_triples: int = 48, num_books: int = 12) -> Path:
    """`root` with shards of triples and books, a held-out shard and a tokenizer."""
    half = num_triples // 2
    write_shard(root / "triples-000000.tar", [triple(seed) for seed in range(half)])
    write_shard(root / "triples-000001.tar", [triple(seed) for seed in range(half, num_triples)])
    write_shard(root / "books-000000.tar", [book(seed) for seed in range(num_books)])
    write_shard(root / "heldout-000000.tar", [triple(seed) for seed in range(1000, 1016)])
    make_tokenizer(root / "tokenizer")
    return root


def tiny_tree(corpus: Path, runs: Path) -> dict[str, Any]:
    """A run over the corpus with every modality and objective; change the tree, then `build`."""
    triples = {
        "shards": str(corpus / "triples-*.tar"),
        "texts": ["txt", "json:names.other"],
        "objectives": ["captioning", "similarity", "masked_lm"],
    }
    return {
        "run": {"name": "tiny", "dir": str(runs)},
        "data": {
            "tokenizer": str(corpus / "tokenizer"),
            "context_length": 128,
            "bin_tokens": 600,
            "bins_per_step": 2,
            "window_steps": 3,
            "sources": {
                "triples": triples,
                "books": {"shards": str(corpus / "books-*.tar"), "objectives": ["captioning", "masked_lm"]},
            },
        },
        "model": {
            "transformer": {
                "width": 32,
                "depth": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "mlp_width": 48,
                "dropout": 0.1,
            },
            "image": {
                "name": "vit_tiny_patch16_224",
                "image_size": 32,
                "options": {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2},
            },
            "audio": {"width": 32, "depth": 1, "num_heads": 2},
        },
        "objectives": {
            "captioning": {"kind": "captioning"},
            "masked_lm": {"kind": "masked_lm", "context": "image", "weight": 0.5},
            "similarity": {
                "kind": "similarity",
                "pairs": [["image", "text0"], ["audio", "text0"], ["text0", "text1"]],
            },
        },
        "train": {
            "steps": 6,
            "seed": 1,
            "log_every": 1,
            "save_every": 3,
            "schedule": {"warmup_steps": 2},
            "num_threads": 1,
        },
        "eval": {"sources": {"heldout": triples | {"shards": str(corpus / "heldout-*.tar")}}, "max_new_tokens": 6},
    }


def damaged(tree: dict[str, Any], corpus: Path, copy: Path) -> dict[str, Any]:
    """The same run over a copy of the corpus with one picture (`triple0003`) whose header is whole and whose pixels are not."""
    shutil.copytree(corpus, copy, ignore=shutil.ignore_patterns("*.index"))
    shard, picture = copy / "triples-000000.tar", png(3)
    content = shard.read_bytes()
    assert content.count(picture) == 1
    shard.write_bytes(content.replace(picture, picture[:60] + bytes(len(picture) - 60)))
    return json.loads(json.dumps(tree).replace(str(corpus), str(copy)))
