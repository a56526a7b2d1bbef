"""The configurations of the real sets, run for seconds on stand-ins that are built as the real sets are: tones for digits and speech,
colours for stamps, pages with pictures for the manual. What they reach on the real ones stands in docs/results.md.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mmctx import api
from mmctx.datasets.build.fsdd import WORDS, build_fsdd
from mmctx.datasets.build.tokenizer import build_tokenizer
from mmctx.datasets.build.writer import BuildOptions
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
