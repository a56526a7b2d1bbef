"""`mmctx data stats`: its numbers are those that a plain count over the data gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from make_shards import area, clip_length, make_document, make_triples, write_shard
from PIL import Image
from plant import plain
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.cli.tables import bars
from mmctx.datasets.shards.index import index_shards
from mmctx.datasets.view.stats import Distribution, bin_edges, source_stats
from mmctx.errors import MmctxError


@pytest.mark.parametrize("most", [1, 40, 9_999, 3_000_000])
def test_a_distribution_agrees_with_numpy(most: int) -> None:
    rng = np.random.default_rng(most)
    parts = [rng.integers(0, most + 1, size) for size in (1, 0, 500, 77)]
    values = np.concatenate(parts)
    found = Distribution("tokens")
    for part in parts:
        found.add(part)
    exact = {"count": len(values), "min": values.min(), "max": values.max(), "mean": values.mean()}
    summary = found.summary()
    assert {name: summary[name] for name in exact} == pytest.approx(exact, rel=1e-12)
    for name, share in (("median", 0.5), ("p95", 0.95)):
        expected = np.quantile(values, share, method="inverted_cdf")
        assert summary[name] == pytest.approx(expected, rel=5e-4, abs=0 if most > 9_999 else 1e-9)
    edges, counts = found.histogram(24)
    assert counts.sum() == len(values)
    assert len(counts) <= 24
    assert edges[0] <= values.min()
    assert edges[-1] > values.max()


def test_a_distribution_stays_small() -> None:
    found = Distribution("bytes")
    found.add(np.arange(10_000_000, 12_000_000))
    assert len(found) == 2_000_000
    assert len(found.values) <= 2_001


def test_bins_of_whole_numbers_are_equally_wide() -> None:
    np.testing.assert_array_equal(bin_edges(1, 22, 24), np.arange(1, 24))
    np.testing.assert_array_equal(bin_edges(1, 26, 24), np.arange(1, 28, 2))
    np.testing.assert_array_equal(bin_edges(64, 64, 24), [64, 65])


def test_bars_show_every_bin_that_is_not_empty() -> None:
    found = Distribution("tokens")
    found.add(np.array([1] * 1000 + [3] + [4] * 500))
    assert bars(found) == "█ ▁▄"


def test_source_stats_agree_with_what_was_written(tmp_path: Path, tokenizer) -> None:
    triples, document = make_triples(6), make_document()
    broken = plain("broken", txt=b"\xff")
    no_text = plain("zz", txt=None)
    paths = [
        write_shard(tmp_path / "a.tar", triples[:4]),
        write_shard(tmp_path / "b.tar", [*triples[4:], broken, document, no_text]),
    ]
    texts = ("txt", "json:names.zh")
    shards = index_shards(paths, tokenizer, texts)
    stats = source_stats("mine", shards, texts, image_tokens=area, audio_tokens=clip_length)
    assert (stats.num_shards, stats.num_samples, stats.problems) == (2, 9, {"bad_text": 1})
    assert stats.modalities == {"image + audio + text": 6, "image + audio": 1, "interleaved": 1}
    found = stats.distributions
    heights = [8 + n for n in range(6)] + [10, 30] + [8]
    assert found["picture height"].total == sum(heights)
    seconds = [(100 + n) / 8000 for n in range(6)] + [160 / 16000, 400 / 8000]
    assert stats.hours * 3600 == pytest.approx(sum(seconds), abs=1e-3 * len(seconds))
    captions = [len(tokenizer.encode(sample["txt"].decode())) for sample in triples]
    assert found["text tokens, txt"].summary()["median"] == np.quantile(captions, 0.5, method="inverted_cdf")
    assert found["text tokens, txt"].total == sum(captions)
    segments = json.loads(document["json"])["segments"]
    in_document = sum(len(tokenizer.encode(s["text"])) for s in segments if "text" in s)
    assert found["document text tokens"].total == in_document
    assert found["document media"].summary()["max"] == 3
    names = [json.loads(sample["json"])["names"]["zh"] for sample in triples]
    of_texts = sum(captions) + sum(len(tokenizer.encode(name)) for name in names) + in_document
    pixels = sum((8 + n) * 12 for n in range(6)) + 10 * 20 + 30 * 40 + 8 * 12
    samples = sum(100 + n for n in range(6)) + 160 + 400
    assert found["sample tokens"].total == of_texts + pixels + samples
    assert len(found["sample tokens"]) == 8


@pytest.mark.slow
def test_the_command_forecasts_and_draws(tree: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs the `plot` extra")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = ["data", "stats", str(tmp_path / "run.yaml"), "train.steps=4"]
    done = CliRunner().invoke(app, [*command, "--plot", str(tmp_path / "x.png"), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["sources"].keys() == {"triples", "books", "heldout (held out)"}
    assert answer["sources"]["triples"]["distributions"]["clip seconds"]["count"] == 48
    assert answer["forecast"]["steps"] == 4
    with Image.open(tmp_path / "x.png") as picture:
        picture.load()
        assert len(set(picture.convert("L").resize((60, 40)).tobytes())) > 10  # something is drawn
    done = CliRunner().invoke(app, command)
    assert "packing: bins of 600 tokens are filled to" in done.stdout
    done = CliRunner().invoke(app, [*command, "--plot", str(tmp_path / "x.doc")])
    assert isinstance(done.exception, MmctxError)
    assert "x.doc" in str(done.exception)
