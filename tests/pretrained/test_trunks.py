"""Logits of ours and of Transformers' own models, from their folders and back into them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ours import OBJECTIVES, batch_of, load, logits
from safetensors.torch import load_file, save_file
from small_models import MODELS, VOCAB, fill
from torch import Tensor

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.generate import generate
from mmctx.model import MmctxModel, ModelConfig
from mmctx.pretrained.trunk import export_trunk

LENGTHS = [3, 31, 1, 17]


def documents(seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]


def open_theirs(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def their_logits(model: Any, texts: Sequence[Tensor]) -> list[Tensor]:
    """One document at a time."""
    return [model(input_ids=ids[None]).logits[0] for ids in texts]


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for got, want in zip(ours, theirs, strict=True):
        assert want.std() > 0.3  # something to be compared
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_imported_logits_equal_theirs(name: str, folders: dict[str, Path]) -> None:
    texts = documents()
    ours = logits(load(folders[name], VOCAB), texts, causal=not name.startswith("bert"))
    assert_close(ours, their_logits(open_theirs(folders[name]), texts))


@pytest.mark.parametrize("name", MODELS)
def test_exported_logits_equal_ours(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    texts, kind = documents(), name.split("-")[0]
    model = load(folders[name], VOCAB)
    export_trunk(model, tmp_path / "out", kind, context_length=128, eos_token_id=0)
    assert_close(logits(model, texts, causal=kind != "bert"), their_logits(open_theirs(tmp_path / "out"), texts))


@pytest.mark.parametrize("name", MODELS)
def test_exported_tensors_are_all_that_transformers_wants(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """No weight is missing, superfluous or of another shape: what other loaders of these folders, such as vLLM's, go by."""
    kind = name.split("-")[0]
    export_trunk(load(folders[name], VOCAB), tmp_path / "out", kind, context_length=128)
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    if "rope_parameters" in tree:  # readers before Transformers 5
        assert tree["rope_theta"] == tree["rope_parameters"]["rope_theta"]
        assert {"rope_type": "default"} | (tree["rope_scaling"] or {}) | {"rope_theta": tree["rope_theta"]} == tree[
            "rope_parameters"
        ]
    cls = getattr(transformers, MODELS[name][0])
    _, found = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found


def test_shards_base_models_and_stored_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    """Shards behind an index, weights in bf16, tensors of a model without a head, which have no prefix."""
    texts = documents()
    half = open_theirs(folders["qwen3-tied-biased-windows"]).bfloat16()
    half.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    half.model.save_pretrained(tmp_path / "base")
    want = their_logits(open_theirs(tmp_path / "shards"), texts)
    assert_close(logits(load(tmp_path / "shards", VOCAB), texts, causal=True), want)
    assert_close(logits(load(tmp_path / "base", VOCAB), texts, causal=True), want)


def test_berts_first_checkpoints_name_norms_otherwise(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    assert any(name.endswith("gamma") for name in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    texts = documents()
    want = their_logits(open_theirs(folders["bert"]), texts)
    assert_close(logits(load(tmp_path / "old", VOCAB), texts, causal=False), want)


def test_gpt2s_first_checkpoints_have_no_prefix_and_store_masks(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gpt2"], tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in old
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 40, 40).tril() for layer in range(3)}
    save_file(old, path, metadata={"format": "pt"})
    texts = documents()
    want = their_logits(open_theirs(folders["gpt2"]), texts)
    assert_close(logits(load(tmp_path / "old", VOCAB), texts, causal=True), want)


def test_older_folders_keep_rope_at_the_top(folders: dict[str, Path], tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling`, as before Transformers 5."""
    shutil.copytree(folders["llama-llama3"], tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    tree = json.loads(path.read_text())
    rope = tree.pop("rope_parameters")
    tree |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(tree))
    texts = documents()
    want = their_logits(open_theirs(folders["llama-llama3"]), texts)
    assert_close(logits(load(tmp_path / "old", VOCAB), texts, causal=True), want)


@pytest.mark.parametrize("name", ["llama-llama3", "qwen3-tied-biased-windows", "gpt2"])
def test_generation_with_a_cache_equals_theirs(name: str, folders: dict[str, Path]) -> None:
    texts = [ids[:9] for ids in documents()]
    theirs = open_theirs(folders[name])
    got = generate(load(folders[name], VOCAB), batch_of(texts, causal=True), eos_id=-1, max_new_tokens=12)
    for ids, tokens in zip(texts, got, strict=True):
        want = theirs.generate(ids[None], max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert tokens == want[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("options", "to", "words"),
    [
        ({}, "llama", "qk_norm=True, llama has False"),
        ({"windows": [4, None]}, "mistral", r"windows=\[4, None\], mistral has one for all layers"),
        ({"windows": [4, 8]}, "qwen3", r"windows=\[4, 8\], qwen3 has one size beside none"),
        ({"norm": "layer"}, "qwen3", "norm='layer', qwen3 has 'rms'"),
        ({"qkv_bias": True, "qk_norm": False}, "mistral", "qkv_bias=True, mistral has False"),
        ({}, "gpt2", "learned_positions=None, gpt2 has no other"),
        ({}, "bart", "known families are llama"),
    ],
)
def test_export_says_what_a_family_lacks(options: dict[str, Any], to: str, words: str, tmp_path: Path) -> None:
    config = build_config(ModelConfig, {"transformer": {"width": 32, "depth": 2, "mlp_width": 40} | options}, "test")
    with pytest.raises(ConfigError, match=words):
        export_trunk(MmctxModel(config, OBJECTIVES, VOCAB), tmp_path / "out", to, context_length=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "to"),
    [
        ({"qk_norm": False}, "qwen2"),  # whose biases are zeros then
        ({"qk_norm": False, "qkv_bias": True}, "llama"),  # a bias on the output, too
        ({"rope": {"scaling": "ntk", "factor": 3.0}, "windows": [6, 6, None]}, "qwen3"),
        (
            {"rope": {"scaling": "yarn", "factor": 4.0, "original_context": 8, "mscale": 1.0, "mscale_all_dim": 0.7}},
            "qwen3",
        ),
        ({"norm": "layer", "qk_norm": False, "activation": "gelu", "learned_positions": 40}, "gpt2"),
    ],
)
def test_models_of_our_own_are_exported_exactly(options: dict[str, Any], to: str, tmp_path: Path) -> None:
    shape = {"width": 48, "depth": 3, "num_heads": 4, "num_kv_heads": 4, "mlp_width": 40, "tie_embeddings": False}
    config = build_config(ModelConfig, {"transformer": shape | options}, "test")
    torch.manual_seed(3)
    model, texts = fill(MmctxModel(config, OBJECTIVES, VOCAB).eval()), documents()
    export_trunk(model, tmp_path / "out", to, context_length=64)
    assert_close(logits(model, texts, causal=True), their_logits(open_theirs(tmp_path / "out"), texts))
