"""The API: `mmctx.train` stays a function, and evaluating a checkpoint needs nothing but its own files and the shards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import WORDS, tiny_tree
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmctx.api import build_dataset, build_model, evaluate
from mmctx.config import build_config
from mmctx.eval.results import add_results, read_results
from mmctx.tokenizer import TextTokenizer
from mmctx.train.checkpoints.load import load_run_config
from mmctx.train.checkpoints.saver import save_checkpoint
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.config import RunConfig


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import mmctx",
        "import mmctx.api",
        "import mmctx, mmctx.train.loop",
        "import mmctx; mmctx.train; import mmctx.train.optim",
        "from mmctx.train.loop import train; import mmctx",
    ],
)
def test_train_is_a_function_in_every_order_of_imports(code: str) -> None:
    check = f"""
{code}
from mmctx import train
from mmctx.train import loop
import mmctx.train.checkpoints.load
assert mmctx.train is train is loop.train, mmctx.train
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run_dir(corpus: Path, tmp_path: Path) -> Path:
    """An untrained checkpoint of step 3 over a corpus of its own, and one logged line."""
    tree = tiny_tree(shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "runs")
    config = build_config(RunConfig, tree, "tree")
    data = build_dataset(config)
    model = build_model(config, data)
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    save_checkpoint(run_dir, config, model, data.tokenizer, torch.optim.AdamW(model.parameters()), TrainerState(step=3))
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss/captioning": 5.0}) + "\n")
    return run_dir


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def other_tokenizer(folder: Path) -> None:
    """Knows the same words by other ids."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("retrained", [False, True])
def test_the_tokenizer_is_the_checkpoints_own(run_dir: Path, tmp_path: Path, retrained: bool) -> None:
    corpus = tmp_path / "corpus"
    before = evaluate(run_dir, suites=["loss"])
    shutil.rmtree(corpus / "tokenizer")
    indexed = files(corpus)
    assert len(indexed) > len(list(corpus.glob("*.tar")))
    if retrained:
        other_tokenizer(corpus / "tokenizer")
    assert evaluate(run_dir, suites=["loss"])["loss"] == before["loss"]
    assert {path: files(corpus)[path] for path in indexed} == indexed  # no shard was indexed anew
    page = (run_dir / "report.html").read_text()
    assert str(corpus / "tokenizer") in page  # the configuration shown is the run's
    assert 'id="batch"' in page


def test_a_saved_tokenizer_has_the_same_fingerprint(corpus: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(corpus / "tokenizer")
    tokenizer.encode("a text before saving")
    tokenizer.save(tmp_path / "saved")
    assert TextTokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_suites_of_one_step_join_in_one_entry(run_dir: Path) -> None:
    first = evaluate(run_dir, suites=["loss", "retrieval"])
    assert first["loss"]["captioning"].keys() == {"held_out", "n"}
    second = evaluate(run_dir, suites=["masked-lm"])
    assert second["masked_lm"]["n"] > 0
    assert {name: second[name] for name in first} == first
    assert read_results(run_dir) == [second]

    config = load_run_config(run_dir / "checkpoint-3")
    data = build_dataset(config)
    model = build_model(config, data)
    save_checkpoint(run_dir, config, model, data.tokenizer, torch.optim.AdamW(model.parameters()), TrainerState(step=4))
    third = evaluate(run_dir, suites=["masked_lm"])
    assert "retrieval" not in third
    assert read_results(run_dir) == [second, third]
    assert 'id="masked_lm"' in (run_dir / "report.html").read_text()


@pytest.mark.slow
def test_the_larger_count_of_unusable_samples_stays(run_dir: Path) -> None:
    entry = evaluate(run_dir, suites=["masked_lm"])
    add_results(run_dir, entry | {"skipped": {"undecodable_image": 2}})
    assert evaluate(run_dir, suites=["masked_lm"])["skipped"] == {"undecodable_image": 2}
