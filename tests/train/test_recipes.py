"""The shipped recipes, at toy size on tiny data: every stage and objective of each runs, and what is learnt is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import words, write_shard
from transformers import PreTrainedTokenizerFast

from mmctx import api
from mmctx.config import load_config
from mmctx.jsonl import read_lines
from mmctx.train.config import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"
TRUNK = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48}
IMAGE = ["name=vit_tiny_patch16_224", "image_size=32", "shuffle=1"]
IMAGE += ["options={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}"]
TOY = {"bin_tokens": 400, "bins_per_step": 2, "num_workers": 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of long texts and of sentence pairs."""
    root = tmp_path_factory.mktemp("texts")
    for split, start in (("train", 0), ("heldout", 500)):
        long = [{"__key__": f"t{n:03d}", "txt": words(start + n, 30 + n % 60).encode()} for n in range(24)]
        write_shard(root / "texts" / split / "a.tar", long)
        pairs = [
            {
                "__key__": f"p{n:03d}",
                "txt": (text := words(start + n, 5)).encode(),
                "json": json.dumps({"second": text[::-1]}),
            }
            for n in range(16)
        ]
        write_shard(root / "pairs" / split / "a.tar", pairs)
    return root


def run_of(recipe: str, root: Path, overrides: Sequence[str]) -> RunConfig:
    """A recipe with its sizes overridden and its shards below `root` instead of `data`."""
    return load_config(RunConfig, CONFIGS / f"{recipe}.yaml", [*overrides, f"run.dir={root / 'runs'}"])


def sizes(trunk: dict[str, Any], tokenizer: Path, context_length: int, **more: Any) -> list[str]:
    tree = [f"model.transformer.{name}={json.dumps(value)}" for name, value in trunk.items()]
    tree += [f"data.{name}={value}" for name, value in (TOY | {"context_length": context_length} | more).items()]
    return [*tree, f"data.tokenizer={tokenizer}", "train.precision=fp32", "train.num_threads=1", "train.log_every=1"]


def shards(config: str, folder: Path) -> list[str]:
    return [f"data.sources.{config}.shards={folder}"]


def train(config: RunConfig) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    result = api.train(config)
    assert result.step == config.steps
    lines = [line for line in read_lines(result.run_dir / "metrics.jsonl") if "loss" in line]
    assert all(np.isfinite(line["loss"]) for line in lines)
    return lines


def objectives_of(lines: Sequence[dict[str, Any]]) -> set[str]:
    return {key.removeprefix("loss/") for line in lines for key in line if key.startswith("loss/")}


def test_gpt2_mlm_ss(texts: Path, corpus: Path, tmp_path: Path) -> None:
    trunk = TRUNK | {"num_kv_heads": None, "learned_positions": 64}
    overrides = sizes(trunk, corpus / "tokenizer", 64)
    overrides += shards("texts", texts / "texts/train/*.tar") + shards("pairs", texts / "pairs/train/*.tar")
    overrides += [f"eval.sources.texts.shards={texts / 'texts/heldout/*.tar'}"]
    overrides += ["schedule=[{steps: 3, sources: {texts: 1}}, {steps: 2, sources: {pairs: 1}, lr_factor: 0.1}]"]
    config = run_of("gpt2_mlm_ss", tmp_path, overrides)
    assert config.model.transformer.activation == "gelu_tanh"
    lines = train(config)
    assert objectives_of(lines[:3]) == {"causal_lm", "masked_lm", "similarity"}
    assert objectives_of(lines[3:]) >= {"causal_lm", "similarity"}
    assert lines[3]["lr"] < lines[2]["lr"]
    found = api.evaluate(tmp_path / "runs" / "gpt2_mlm_ss", suites=["loss", "masked_lm"])
    assert found["loss"]["causal_lm"]["n"] > 0
    assert found["masked_lm"]["n"] > 0


def test_bert_mlm_nsp(texts: Path, corpus: Path, tmp_path: Path) -> None:
    PreTrainedTokenizerFast.from_pretrained(
        str(corpus / "tokenizer"), cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    ).save_pretrained(str(tmp_path / "tokenizer"))
    trunk = TRUNK | {"num_kv_heads": None, "learned_positions": 64}
    overrides = sizes(trunk, tmp_path / "tokenizer", 64) + shards("texts", texts / "texts/train/*.tar")
    overrides += [f"eval.sources.texts.shards={texts / 'texts/heldout/*.tar'}", "train.steps=3"]
    config = run_of("bert_mlm_nsp", tmp_path, overrides)
    assert config.model.transformer.norm_place == "post"
    assert objectives_of(train(config)) == {"masked_lm", "next_sentence"}
    found = api.evaluate(tmp_path / "runs" / "bert_mlm_nsp", suites=["masked_lm", "next_sentence"])
    assert found["next_sentence"]["n"] > 0


@pytest.mark.slow
def test_progressive(texts: Path, corpus: Path, tmp_path: Path) -> None:
    overrides = sizes(TRUNK, corpus / "tokenizer", 64)
    overrides += [f"model.image.{option}" for option in IMAGE]
    overrides += shards("texts", texts / "texts/train/*.tar") + shards("web", corpus / "books-*.tar")
    overrides += ["model.audio={width: 32, depth: 1, num_heads: 2}", "eval={}"]  # the tiny books have sounds
    for number, length in enumerate((32, None, None, None, 128)):
        overrides += [f"schedule.{number}.tokens=null", f"schedule.{number}.steps=1"]
        overrides += [f"schedule.{number}.context_length={length}"] if length else []
    config = run_of("progressive", tmp_path, overrides)
    lines = train(config)
    assert [line["stage"] for line in lines] == [0, 1, 2, 3, 4]
    assert objectives_of(lines) == {"causal_lm", "masked_lm", "denoising"}
    begins = [line["begins"] for line in read_lines(tmp_path / "runs/progressive/metrics.jsonl") if "begins" in line]
    assert [stage["context_length"] for stage in begins] == [32, 64, 64, 64, 128]
    assert begins[4]["rope"]["scaling"] == "yarn"
    assert begins[2]["modules"] == {"trunk": {"freeze": True}}


def test_multimodal_fusion(corpus: Path, tmp_path: Path) -> None:
    overrides = sizes(TRUNK, corpus / "tokenizer", 128, bin_images=40)
    overrides += [f"model.image.{option}" for option in IMAGE]
    overrides += ["model.audio={width: 32, depth: 1, num_heads: 2}", "train.steps=3"]
    overrides += shards("triples", corpus / "triples-*.tar") + shards("stories", corpus / "books-*.tar")
    overrides += [f"eval.sources.triples.shards={corpus / 'heldout-*.tar'}"]
    lines = train(run_of("multimodal_fusion", tmp_path, overrides))
    assert objectives_of(lines) == {"captioning", "masked_lm", "similarity"}
    assert all(lines[-1][f"tokens/{kind}"] > 0 for kind in ("text", "image", "audio"))
    found = api.evaluate(tmp_path / "runs" / "multimodal_fusion", suites=["loss", "retrieval"])
    assert found["retrieval"]
