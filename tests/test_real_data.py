"""The configurations of the real sets, run for seconds on stand-ins that are built as the real sets are: tones for digits and speech,
colours for stamps, pages with pictures for the manual. What they reach on the real ones stands in docs/results.md.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmctx import api
from mmctx.datasets.build.fsdd import WORDS, build_fsdd
from mmctx.datasets.build.gimp import build_gimp
from mmctx.datasets.build.shards import read_shard
from mmctx.datasets.build.stamps import build_stamps
from mmctx.datasets.build.tokenizer import build_tokenizer
from mmctx.datasets.build.writer import BuildOptions
from mmctx.tokenizer import TextTokenizer
from mmctx.train.loop import train

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = BuildOptions(num_workers=1)
SHORT = ("train.num_threads=1", "train.schedule.warmup_steps=10", "data.num_workers=0")


def tone(number: int, pitch: int) -> bytes:
    """A short tone of one of ten pitches, with noise, never twice the same."""
    rng = np.random.default_rng([number, pitch])
    time = np.arange(int(8000 * rng.uniform(0.2, 0.4))) / 8000
    wave = 0.4 * np.sin(2 * np.pi * 250 * 1.25**pitch * time + rng.uniform(0, 6)) + 0.02 * rng.standard_normal(
        len(time)
    )
    out = io.BytesIO()
    soundfile.write(out, wave.astype(np.float32), 8000, format="WAV")
    return out.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pitches for ten digits, recordings 0 to 19 of each."""
    root = tmp_path_factory.mktemp("digits")
    (root / "wavs").mkdir()
    for digit in range(10):
        for number in range(20):
            (root / "wavs" / f"{digit}_ann_{number}.wav").write_bytes(tone(number, digit))
    build_fsdd(root, root / "wavs", options=OPTIONS)
    build_tokenizer(root / "tokenizer", [str(root / "train" / "*.tar")], vocab_size=300)
    return root


def train_digits(root: Path, runs: Path, *overrides: str) -> dict[str, Any]:
    placed = [
        f"run.dir={runs}",
        f"data.tokenizer={root / 'tokenizer'}",
        f"data.sources.digits.shards={root / 'train' / '*.tar'}",
        f"eval.sources.digits.shards={root / 'test' / '*.tar'}",
    ]
    config = api.load_config(CONFIGS / "spoken_digits.yaml", *placed, *SHORT, *overrides)
    return api.evaluate(train(config).run_dir)


@pytest.mark.slow
def test_spoken_digits_learn_tones(digits: Path, tmp_path: Path) -> None:
    speeds = "data.sources.digits.augment.audio.speeds=[1.0]"  # another speed is another pitch
    found = train_digits(digits, tmp_path, "train.steps=60", "data.bin_tokens=1024", "train.optimizer.lr=4e-3", speeds)
    scores = found["zero_shot"]["audio/captioning"]
    assert scores["n"] == 50
    assert scores["top1"] > 0.9
    assert scores["chance"] == 0.1
    assert set(scores["per_class"]) == set(WORDS)
    assert found["caption"]["audio_exact"] > 0.9
    assert found["swapped_media"]["captioning"]["low"] > 0.5  # with another clip before it the word is a surprise
    probe = found["probe"]["audio"]
    assert (probe["n_train"], probe["n"], probe["classes"]) == (150, 50, 10)
    assert probe["input"]["linear"]["accuracy"] > 0.9
    robust = found["robustness"]["zero_shot"]
    assert set(robust) == {"audio/noise", "audio/speed"}
    for curves in robust.values():
        assert curves["audio/captioning"]["top1"][0] == scores["top1"]
    assert robust["audio/speed"]["audio/captioning"]["top1"][-1] < 0.5  # another speed is another digit here


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 30),
    "blue": (30, 30, 220),
    "white": (240, 240, 240),
    "black": (9, 9, 9),
}
FRENCH = dict(zip(COLOURS, ("rouge", "vert", "bleu", "blanc", "noir"), strict=True))


def flag(left: str, right: str) -> bytes:
    """A picture of two colours."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = COLOURS[left], COLOURS[right]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def spoken(seed: int, left: str, right: str) -> bytes:
    """Two tones, one for each colour."""
    waves = [soundfile.read(io.BytesIO(tone(seed, list(COLOURS).index(word))))[0] for word in (left, right)]
    out = io.BytesIO()
    soundfile.write(out, np.concatenate(waves).astype(np.float32), 8000, format="OGG", subtype="VORBIS")
    return out.getvalue()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 flags, named and spoken in two languages, laid out as Tux Paint's stamps; some are held out in both."""
    root = tmp_path_factory.mktemp("flags")
    (root / "in").mkdir()
    for number, (left, right) in enumerate(itertools.product(COLOURS, COLOURS)):
        stem = root / "in" / f"{left}-{right}"
        stem.with_suffix(".png").write_bytes(flag(left, right))
        stem.with_suffix(".txt").write_text(f"{left} {right}\nfr.utf8={FRENCH[left]} {FRENCH[right]}\n")
        for language, seed in (("", number), ("_fr", 100 + number)):
            (root / "in" / f"{stem.name}_desc{language}.ogg").write_bytes(spoken(seed, left, right))
    for language in ("en", "fr"):
        build_stamps(
            root / language, root / "in", languages=[language], options=BuildOptions(num_workers=1, heldout=0.3)
        )
    build_tokenizer(root / "tokenizer", [str(root / "{en,fr}" / "train" / "*.tar")], vocab_size=300)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("name", "views"), [("stamps", ("image", "audio")), ("stamps_pictures", ("image",))])
def test_stamps_learn_flags(flags: Path, tmp_path: Path, name: str, views: tuple[str, ...]) -> None:
    """Flags whose two colours never stood together in training are found by picture and by speech, in both languages."""
    held_out = {
        language: {
            "shards": str(flags / language / "heldout" / "*.tar"),
            "texts": ["txt", "json:names.en"],
            "objectives": ["similarity"],
        }
        for language in ("en", "fr")
    }
    sound = {"audio": {"speeds": [1.0]}}  # pictures stay: left and right are what it is about
    spoken = held_out["en"] | {"shards": f"{flags}/{{en,fr}}/train/*.tar"}
    heard = (
        "model.audio={sample_rate: 8000, n_fft: 200, hop_length: 80, num_mels: 40, width: 64, depth: 1, num_heads: 2}"
    )
    if "audio" in views:
        spoken |= {"augment": sound}
    config = api.load_config(
        CONFIGS / f"{name}.yaml",
        f"run.dir={tmp_path}",
        f"data.tokenizer={flags / 'tokenizer'}",
        f"data.sources={json.dumps({'spoken': spoken})}",
        f"eval.sources={json.dumps(held_out)}",
        "model.transformer={width: 64, depth: 1, num_heads: 2, mlp_width: 128, norm: layer}",
        "model.image={name: vit_tiny_patch16_224, image_size: 64, stem: conv, shuffle: 2, "
        "options: {embed_dim: 64, depth: 1, num_heads: 2}}",  # pretrained weights may not be at hand
        "train.modules={}",
        *([heard] if "audio" in views else []),
        "data.bin_tokens=2048",
        "train.steps=80",
        "train.optimizer.lr=3e-3",
        *SHORT,
    )
    found = api.evaluate(train(config).run_dir)["retrieval"]
    for language in ("en", "fr"):
        for view in views:
            scores = found[f"{view}_to_text"]["by_source"][language]
            assert scores["n"] == len(list(read_heldout(flags / language)))
            assert scores["R@1"] > 3 / scores["n"]


def read_heldout(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / "heldout").glob("*.tar")):
        yield from read_shard(path)


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manual of 24 chapters, each of a page that shows colours and names them, in the layout of GIMP's; some chapters are held out."""
    root = tmp_path_factory.mktemp("manual")
    (root / "in" / "images").mkdir(parents=True)
    for colour in COLOURS:
        (root / "in" / "images" / f"{colour}.png").write_bytes(flag(colour, colour))
    names = ["index", *(f"chapter{number}" for number in range(24))]
    rng = np.random.default_rng(0)
    for name, following in zip(names, [*names[1:], ""], strict=True):
        shown = rng.choice(list(COLOURS), 60)
        body = "".join(f'<img src="images/{c}.png"/><p>{c}</p>' for c in shown)
        unit = "book" if name == "index" else "chapter"
        link = f'<link rel="next" href="{following}.html"/>' if following else ""
        page = f"<html><head><title>{name}</title>{link}</head><body><div class='{unit}'>{body}</div></body></html>"
        (root / "in" / f"{name}.html").write_text(page)
    build_gimp(root, root / "in", unit="chapter", options=BuildOptions(num_workers=1, heldout=0.2))
    build_tokenizer(root / "tokenizer", [str(root / "train" / "*.tar")], vocab_size=300)
    return root


@pytest.mark.slow
def test_a_manual_is_read_in_long_parts(manual: Path, tmp_path: Path) -> None:
    """Held-out chapters are read whole, the longer parts of the last stage included; that colours are random leaves a known loss."""
    config = api.load_config(
        CONFIGS / "manual.yaml",
        f"run.dir={tmp_path}",
        f"data.tokenizer={manual / 'tokenizer'}",
        f"data.sources.chapters.shards={manual / 'train' / '*.tar'}",
        f"eval.sources.chapters.shards={manual / 'heldout' / '*.tar'}",
        "model.transformer={width: 64, depth: 2, num_heads: 2, mlp_width: 128, norm: layer, windows: [64, null]}",
        "model.image={name: vit_tiny_patch16_224, image_size: 32, shuffle: 2, options: {embed_dim: 64, depth: 1, num_heads: 2}}",
        "schedule=[{steps: 40, context_length: 128, bin_tokens: 1024}, {steps: 10, context_length: 512, bin_tokens: 1024}]",
        "train.optimizer.lr=5e-3",
        *SHORT,
    )
    run_dir = train(config).run_dir
    found = api.evaluate(run_dir)
    tokenizer = TextTokenizer(manual / "tokenizer")
    chapters = [json.loads(sample["json"]) for sample in read_heldout(manual)]
    texts = [segment["text"] for chapter in chapters for segment in chapter["segments"] if "text" in segment]
    num_parts = sum(-(-len(chapter["segments"]) // 128) for chapter in chapters)
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert num_tokens <= found["loss"]["captioning"]["n"] <= num_tokens + 3 * num_parts
    guessed = np.log(len(COLOURS)) * len(texts) / num_tokens  # all else is certain
    assert guessed * 0.95 < found["loss"]["captioning"]["held_out"] < guessed * 1.5
    assert (
        found["swapped_media"]["captioning"]["n"] == found["loss"]["captioning"]["n"]
    )  # each chapter begins with a picture
