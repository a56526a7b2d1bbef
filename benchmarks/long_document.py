"""One document of up to 65,536 tokens, with pictures and sound, trained on this machine: how much memory, and how it grows.

    python benchmarks/long_document.py [--json] [--quick] [--lengths 8192,16384,32768,65536]

For every length a tar shard is written that holds one interleaved document of exactly so many tokens: of each 8,192 there are 32
pictures of 128 x 128 (64 tokens each) and 8 clips of 4 seconds (50 tokens each), the rest is text. `mmctx.train` trains a model of 20 M
parameters on it for three steps in a process of its own: six blocks of 256 channels and two heads, of which one attends to the whole
document and five to 512 tokens, a ViT of 11 M parameters, everything in float32 with AdamW. Few heads, because the one global block is
most of the work: 65,536 tokens are two thousand million pairs. Activations: selective checkpointing, MLP tiles of 1,024 tokens, four
pictures or chunks of sound at a time.

Memory is the largest resident size of the process (`ru_maxrss`), Python and libraries included. "Per token" leaves out what it held before
the run began and what does not grow with the document (weights, gradients, moments: 16 bytes a parameter). The estimate is what
`mmctx plan` says of tensors alone.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, photo, report, versions

SIDE = Path(__file__).parent / "sides" / "long_document_side.py"
LENGTHS = (8192, 16384, 32768, 65536)
BAR_GIB = 12.0
"""Of the longest document, everything included."""
BAR_FLAT = 1.15
"""Most over least memory per token, over the lengths."""
WORDS = 8000
PICTURE_TOKENS, CLIP_TOKENS, CLIP_SECONDS = 64, 50, 4.0
UNIT = 8192
PICTURES, CLIPS = 32, 8
"""Of every `UNIT` tokens."""


def write_tokenizer(folder: Path) -> None:
    """One token a word, so that a text has as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|endoftext|>": 0} | {f"w{number}": number + 1 for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(str(folder))


def clip(rng: np.random.Generator) -> bytes:
    """A gliding tone with noise."""
    import soundfile

    time = np.arange(int(CLIP_SECONDS * 16_000)) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * (rng.uniform(100, 400) + 100 * time) * time) + 0.02 * rng.standard_normal(len(time))
    out = io.BytesIO()
    soundfile.write(out, wave.astype(np.float32), 16_000, format="FLAC")
    return out.getvalue()


def write_document(path: Path, tokens: int) -> None:
    """A shard of one document: stretches of text of near-equal length, with a picture or a clip between any two."""
    import webdataset

    rng = np.random.default_rng(tokens)
    pictures, clips = max(1, tokens * PICTURES // UNIT), max(1, tokens * CLIPS // UNIT)
    media = ["image"] * pictures + ["audio"] * clips
    rng.shuffle(media)
    num_words = tokens - pictures * PICTURE_TOKENS - clips * CLIP_TOKENS - 1  # one token ends the document
    members: dict[str, Any] = {"__key__": "document"}
    segments = []
    for number, (kind, count) in enumerate(zip([*media, None], np.diff(_cuts(num_words, len(media) + 1)), strict=True)):
        ranks = np.minimum(rng.zipf(1.2, count) - 1, WORDS - 1)  # frequent and rare words, as in texts
        segments.append({"text": " ".join(f"w{rank}" for rank in ranks)})
        if kind is not None:
            extension, content = ("jpg", photo(number % 50, 160, 128)) if kind == "image" else ("flac", clip(rng))
            members[f"{number}.{extension}"] = content
            segments.append({kind: f"{number}.{extension}"})
    members["json"] = json.dumps({"segments": segments}).encode()
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        writer.write(members)


def _cuts(total: int, parts: int) -> np.ndarray:
    return np.arange(parts + 1) * total // parts


def write_config(folder: Path, tokens: int, steps: int, quick: bool) -> Path:
    """The run's YAML (JSON is YAML)."""
    width, depth = (64, 4) if quick else (256, 6)
    picture = {"embed_dim": 64, "depth": 2, "num_heads": 1} if quick else {"embed_dim": 384, "depth": 6, "num_heads": 6}
    sound = {"width": 64, "depth": 2, "num_heads": 1} if quick else {"width": 256, "depth": 4, "num_heads": 4}
    tree = {
        "run": {"name": "run", "dir": str(folder)},
        "data": {
            "tokenizer": str(folder.parent / "tokenizer"),
            "context_length": tokens,
            "bin_tokens": tokens,
            "window_steps": 1,
            "sources": {"book": {"shards": str(folder / "document.tar"), "objectives": ["captioning"]}},
        },
        "model": {
            "transformer": {
                "width": width,
                "depth": depth,
                "num_heads": 1 if quick else 2,
                "head_dim": 64,
                "mlp_width": 3 * width,
                "windows": [512, 512, 512, None],
                "rope": {"base": 500_000},
            },
            "image": {"name": "vit_tiny_patch16_224", "image_size": 128, "options": picture},
            "audio": sound,
        },
        "objectives": {"captioning": {"kind": "captioning"}},
        "train": {
            "steps": steps,
            "log_every": 1,
            "num_threads": os.cpu_count(),
            "schedule": {"warmup_steps": 1},
            "activations": {"checkpoint": "selective", "mlp_tile": 1024, "media_chunk": 4},
        },
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


def run(folder: Path, tokens: int, steps: int, quick: bool) -> dict[str, Any]:
    """One length, in a fresh process whose C library returns large blocks at once."""
    folder.mkdir()
    write_document(folder / "document.tar", tokens)
    command = [sys.executable, str(SIDE), str(write_config(folder, tokens, steps, quick))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{tokens} tokens: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == tokens
    assert found["documents"] == 1
    fixed = 16 * found["parameters"]
    grown = found["resident_peak"] - found["resident_before"] - fixed
    found["kib_per_token"] = round(grown / tokens / 1024, 1)
    found["estimated_kib_per_token"] = round((found["estimate"]["total"] - fixed) / tokens / 1024, 1)
    return found


def parse() -> Any:
    """The options of every benchmark, and the lengths."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument(
        "--repeats", type=int, default=1, help="memory does not scatter: taken for the sake of `make bench`"
    )
    parser.add_argument("--lengths", default="", help="other lengths in tokens, with commas")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    lengths = [int(part) for part in arguments.lengths.split(",") if part] or (
        [512, 1024] if arguments.quick else LENGTHS
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        found = {}
        for tokens in lengths:
            found[tokens] = run(folder / str(tokens), tokens, 3, arguments.quick)
            print(f"{tokens} tokens: {found[tokens]}", file=sys.stderr, flush=True)
    per_token = [point["kib_per_token"] for point in found.values()]
    longest = found[max(lengths)]
    result = {
        "lengths": {str(tokens): point for tokens, point in found.items()},
        "peak_gib": round(longest["resident_peak"] / 2**30, 2),
        "flat": round(max(per_token) / min(per_token), 3),
        "bars": {"peak_gib": BAR_GIB, "flat": BAR_FLAT},
        "machine": machine(),
        "versions": versions("torch", "mmctx"),
    }
    lines = [
        f"{tokens:>7} tokens, {point['pictures']} pictures, {point['clips']} clips: {point['resident_peak'] / 2**30:.2f} GiB, "
        f"{point['kib_per_token']} KiB a token (tensors by estimate {point['estimated_kib_per_token']}), "
        f"{point['seconds_per_step']} s a step, losses {[round(loss, 3) for loss in point['losses']]}"
        for tokens, point in found.items()
    ]
    lines.append(f"{longest['parameters']:,} parameters; bar {BAR_GIB} GiB; most over least per token {result['flat']}")
    report(result, lines, arguments.json)


if __name__ == "__main__":
    main()
