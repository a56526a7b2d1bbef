"""Real media and shards, small enough to make in milliseconds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset
from PIL import Image


def encode_image(pixels: np.ndarray, format: str, mode: str | None = None, **options: Any) -> bytes:
    """`pixels` (H, W, 3) or (H, W) as the bytes of a picture file."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def encode_audio(values: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    """`values` (n,) or (n, channels) as the bytes of a sound file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def random_pixels(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def random_clip(seed: int, num_samples: int) -> np.ndarray:
    """(n,) float32 in -0.5..0.5."""
    return np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)


def make_triples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Samples of a picture, a clip, a caption and names in two languages."""
    samples = []
    for number in range(count):
        picture = random_pixels(seed + number, 8 + number, 12)
        png = number % 2
        samples.append(
            {
                "__key__": f"dir/{seed:03d}-{number:05d}",
                ("png" if png else "jpg"): encode_image(picture, "PNG" if png else "JPEG"),
                ("flac" if png else "wav"): encode_audio(
                    random_clip(number, 100 + number), 8000, "FLAC" if png else "WAV"
                ),
                "txt": f"caption number {number}".encode(),
                "json": json.dumps({"names": {"en": f"name {number}", "zh": f"名字{number}"}}).encode(),
            }
        )
    return samples


def make_document(key: str = "story") -> dict[str, Any]:
    """One interleaved document of two pictures, a clip and three pieces of text."""
    segments = [
        {"text": "first a picture "},
        {"image": "0.png"},
        {"text": "then a sound "},
        {"audio": "1.flac"},
        {"image": "2.jpg"},
        {"text": "the end"},
    ]
    return {
        "__key__": key,
        "json": json.dumps({"segments": segments}).encode(),
        "0.png": encode_image(random_pixels(1, 10, 20), "PNG"),
        "1.flac": encode_audio(random_clip(2, 160), 16000, "FLAC"),
        "2.jpg": encode_image(random_pixels(3, 30, 40), "JPEG"),
    }


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    """Writes samples as the webdataset library does."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def area(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Counts a token for each pixel of a picture."""
    return width * height


def clip_length(num_samples: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """Counts a token for each sample of a clip."""
    assert (rate > 0).all()
    return num_samples


def train_tokenizer(folder: Path, vocab_size: int) -> Path:
    """A byte-level BPE in the layout that Transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a caption number 1", "name 2", "then a sound, the end", "名字3"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(str(folder))
    return folder
