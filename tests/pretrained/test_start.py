"""Runs that start from a folder: their shape, their first weights, their tokens, and their life without the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mmctx import api
from mmctx.cli import app
from mmctx.config import build_config, load_config
from mmctx.errors import ConfigError
from mmctx.pretrained.trunk import trunk_config
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.transformer import TransformerConfig


def start(tree: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    """The tiny run from a folder's weights; text and pictures, no sound."""
    tree["model"] = {"transformer": {"pretrained": str(folder), **options}, "image": tree["model"]["image"]}
    tree["data"]["tokenizer"] = str(folder)
    tree["data"]["sources"].pop("books")
    tree["objectives"]["similarity"]["pairs"] = [["image", "text0"]]
    return tree


def test_known_tokens_keep_their_rows_and_new_ones_are_like_them(tree: dict[str, Any], llama: Path) -> None:
    config = build_config(RunConfig, start(tree, llama), "tree")
    tokens = api.build_dataset(config).tokenizer
    model = build_model(config, len(tokens))
    theirs = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    known = len(AutoTokenizer.from_pretrained(llama))
    assert known < len(theirs)
    assert tokens.mask_id >= known
    assert torch.equal(model.embedding.weight[:known], theirs[:known])
    fresh = model.embedding.weight[known:]
    assert len(fresh) > 30
    assert not torch.equal(fresh[: len(theirs) - known], theirs[known:])  # no token of theirs had these
    torch.testing.assert_close(fresh.std(), theirs[:known].std(), rtol=0.1, atol=0)
    again = build_model(config, len(tokens))
    assert torch.equal(again.embedding.weight, model.embedding.weight)  # drawn from the run's seed
    assert torch.equal(again.head_weight, model.head_weight)


def test_a_run_lives_on_without_its_folder(tree: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    config = build_config(RunConfig, start(tree, folder) | {"eval": {}}, "tree")
    trained = api.train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}))
    shutil.rmtree(folder)
    run = tmp_path / "runs" / "tiny"
    first, _, saved = load_model(run)
    assert trained.step == 2
    assert saved.model.transformer == config.model.transformer
    shutil.copytree(run / "checkpoint-2", tmp_path / "tokens")  # the tokenizer went with the folder
    overrides = ["train.steps=3", f"data.tokenizer={tmp_path / 'tokens'}"]
    assert api.train(load_config(RunConfig, run / "config.yaml", overrides)).step == 3
    second, _, _ = load_model(run)
    moved = (second.embedding.weight - first.embedding.weight).abs().max()
    assert 0 < moved < 0.01  # one small step from where it was, not from the start


def test_a_checkpoint_is_exported_with_its_tokenizer(tree: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    config = build_config(RunConfig, start(tree, llama) | {"eval": {}}, "tree")
    api.train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})}))
    run, out = tmp_path / "runs" / "tiny", tmp_path / "out"
    said = CliRunner().invoke(app, ["export", str(run), str(out), "--to", "llama", "--json"])
    assert said.exit_code == 0, said.output
    answer = json.loads(said.stdout)
    assert answer["largest_difference"] < 1e-5 < answer["largest_logit"]
    assert answer["left_out"] == ["encoders.image", "objectives.similarity"]
    theirs, tokens = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    model, ours, _ = load_model(run)
    text = "red apple"
    assert tokens(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.config.eos_token_id == ours.eos_id
    assert len(theirs.get_input_embeddings().weight) == len(ours) == model.vocab_size
    refused = CliRunner().invoke(app, ["export", str(run), str(out), "--to", "qwen3"])
    assert isinstance(refused.exception, ConfigError)
    assert "qk_norm=False, qwen3 has True" in str(refused.exception)


def test_what_extends_the_context_may_be_said_beside(llama: Path) -> None:
    whole = trunk_config(llama)
    assert (whole.width, whole.depth, whole.kv_heads, whole.qk_norm) == (48, 3, 2, False)
    rope = {"scaling": "yarn", "factor": 4.0, "original_context": 128}
    tree = {"pretrained": str(llama), "windows": [8, None], "rope": rope, "width": 48, "dropout": 0.1}
    longer = build_config(TransformerConfig, tree, "test")
    assert longer.windows == (8, None)
    assert longer.rope.base == whole.rope.base
    assert longer.rope.scaling == "yarn"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 64}, r"model\.transformer\.width=64, but the weights of .* have 48"),
        ({"qk_norm": True}, r"qk_norm=True, but .* have False"),
        ({"norm_eps": 1e-6}, r"norm_eps=1e-06, but .* have 1e-05"),
        ({"learned_positions": 64}, r"learned_positions=64, but .* have None"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], words: str, llama: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(TransformerConfig, {"pretrained": str(llama)} | options, "test")


def test_a_strange_tokenizer_is_refused(tree: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    """Its ids would look up other tokens' rows."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    text = (llama / "tokenizer.json").read_text()
    changed = json.loads(text)
    vocabulary = changed["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tokens / "tokenizer.json").write_text(json.dumps(changed))
    tree = start(tree, llama)
    tree["data"]["tokenizer"] = str(tokens)
    config = build_config(RunConfig, tree, "tree")
    with pytest.raises(ConfigError, match=r"gives '[ab]' the id \d+, but the weights .* know it as \d+"):
        build_model(config, 400)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'; known families are llama"),
        ({"model_type": "nonsense"}, "model_type='nonsense'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'; name a folder of weights in bf16"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='dynamic'"),
        ({"num_hidden_layers": 2}, r"holds 'layers\.2\..*', which no 2-layer trunk"),
        ({"num_hidden_layers": 4}, r"holds no tensor 'layers\.3\."),
        ({"intermediate_size": 90}, r"has \(160, 48\) for trunk.blocks.0.mlp.gate_up.weight, the model \(180, 48\)"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    change: dict[str, Any], words: str, tree: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        build_model(build_config(RunConfig, start(tree, folder), "tree"), 400)


def test_other_positions_make_a_dynamic_scaling_of_no_account(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 2e4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": dynamic}))
    tree = {"pretrained": str(tmp_path / "folder"), "rope": {"scaling": "ntk", "factor": 2.0}}
    rope = build_config(TransformerConfig, tree, "test").rope
    assert (rope.base, rope.scaling) == (2e4, "ntk")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folders_without_their_files_are_refused(
    missing: str, tree: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(llama, folder)
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"there is no .*config.json|holds neither {missing}"):
        build_model(build_config(RunConfig, start(tree, folder), "tree"), 400)
