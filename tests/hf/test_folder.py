"""Folders: what the trainer writes Transformers opens, and what Transformers writes the trainer opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_folders import as_earlier
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from mmctx.hf import MmctxConfig, MmctxForConditionalGeneration, MmctxProcessor
from mmctx.model import MmctxModel, ModelConfig
from mmctx.train.checkpoints.load import load_model, load_weights


def same(a: nn.Module, b: nn.Module) -> None:
    """Equal tensors by equal names, constants included."""
    left, right = (dict(m.state_dict()) | dict(m.named_buffers()) for m in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_any_auto_class_opens_a_checkpoint(either: Path) -> None:
    ours, tokenizer, run = load_model(either)
    for auto in (AutoModel, AutoModelForCausalLM, MmctxForConditionalGeneration):
        model, report = auto.from_pretrained(either, output_loading_info=True)
        assert type(model) is MmctxForConditionalGeneration
        assert not model.training
        assert not any(report.values()), report
        same(model, ours)
    config = AutoConfig.from_pretrained(either)
    assert config.shape == run.model
    assert config.objective_configs == run.objectives
    assert (config.vocab_size, config.max_position_embeddings) == (len(tokenizer), 128)
    assert type(AutoProcessor.from_pretrained(either)) is MmctxProcessor


def test_checkpoints_of_earlier_versions_open(checkpoint: Path, tmp_path: Path) -> None:
    earlier = as_earlier(checkpoint, tmp_path / "earlier")
    model, new = (AutoModelForCausalLM.from_pretrained(path) for path in (earlier, checkpoint))
    same(model, new)
    assert model.generation_config.eos_token_id == new.generation_config.eos_token_id is not None
    ignored = ("name_or_path", "_name_or_path", "architectures", "dtype")
    old_config, new_config = (
        {key: value for key, value in AutoConfig.from_pretrained(path).to_dict().items() if key not in ignored}
        for path in (earlier, checkpoint)
    )
    assert old_config == new_config
    processors = [AutoProcessor.from_pretrained(path) for path in (earlier, checkpoint)]
    assert processors[0].to_dict() == processors[1].to_dict()


def test_the_stage_that_was_trained_last_counts(make: Callable[..., Path], tmp_path: Path) -> None:
    longer = {"steps": 2, "context_length": 128, "rope": {"scaling": "linear", "factor": 2.0}, "windows": [8, None]}
    train = {"num_threads": 1, "seed": 1}
    folder = make(
        step=3, schedule=[{"steps": 2, "context_length": 64}, longer, {"steps": 2, "windows": [4]}], train=train
    )
    for path in (folder, as_earlier(folder, tmp_path / "earlier")):
        config = AutoConfig.from_pretrained(path)
        assert config.shape == load_model(folder)[2].model
        assert config.shape.transformer.windows == (8, None)
        assert config.shape.transformer.rope.factor == 2
        assert config.max_position_embeddings == 128


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_save_pretrained_and_back(either: Path, tmp_path: Path, size: str) -> None:
    model, processor = AutoModelForCausalLM.from_pretrained(either), AutoProcessor.from_pretrained(either)
    model.save_pretrained(tmp_path, max_shard_size=size)
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1 or size == "50GB"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(model, again)
    trees = [config.to_dict() | {"name_or_path": "", "_name_or_path": ""} for config in (model.config, again.config)]
    assert trees[0] == trees[1]
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    if size == "50GB":  # the trainer's own reader takes one file
        fresh = MmctxModel(model.config.shape, model.config.objective_configs, model.config.vocab_size)
        load_weights(fresh, tmp_path)
        same(model, fresh.eval())


def test_a_checkpoint_of_bf16(checkpoint: Path, tmp_path: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {b.dtype for b in model.buffers()} == {torch.bfloat16}
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ids = torch.cat([torch.full((1, 4), exact.placeholder_ids["image"]), torch.arange(20, 30)[None]], dim=1)
    with torch.no_grad():
        got, want = (m(ids, pixel_values=pixels).logits.float() for m in (model, exact))
    assert got.ne(want).any()
    assert (got - want).norm() / want.norm() < 0.05
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_big_model_loading(either: Path, tmp_path: Path, place: str) -> None:
    whole = AutoModelForCausalLM.from_pretrained(either)
    modules = {name for name, module in whole.named_modules() if list(module.parameters())}
    parts = [
        n for n in modules if (n and "." not in n and n != "trunk") or (n.count(".") == 1 and n.startswith("trunk."))
    ]
    parts = [n for n in parts if n != "trunk.blocks"] + ["trunk.blocks.0"]
    spread = dict.fromkeys(parts, "cpu") | {"trunk.blocks.1": "disk"}
    if place == "disk" and whole.get_output_embeddings() is None:
        spread["embedding"] = "disk"  # which is the output head, too
    device_map = "auto" if place == "auto" else spread
    model = AutoModelForCausalLM.from_pretrained(either, device_map=device_map, offload_folder=tmp_path)
    kept = {parameter.device.type for parameter in model.parameters()}
    assert kept == ({"cpu"} if place == "auto" else {"cpu", "meta"})
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    ids = torch.cat([torch.full((1, 4), whole.placeholder_ids["image"]), torch.arange(20, 30)[None]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, pixel_values=pixels).logits, whole(ids, pixel_values=pixels).logits)
    got, want = (m.generate(ids, pixel_values=pixels, max_new_tokens=4) for m in (model, whole))
    assert got.tolist() == want.tolist()


def test_blocks_stay_whole_on_their_device(checkpoint: Path) -> None:
    from accelerate import infer_auto_device_map, init_empty_weights

    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    found = infer_auto_device_map(
        model, {0: "60KB", 1: "60KB", "cpu": "1GB"}, no_split_module_classes=model._no_split_modules
    )
    assert len(set(found.values())) > 1
    for name, _ in model.named_modules():
        if name.startswith("trunk.blocks.") and name.count(".") == 2:
            assert any(name == key or name.startswith(f"{key}.") for key in found), (name, found)


def test_what_a_folder_lacks_is_drawn_as_training_draws_it(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    config.objectives = config.objectives | {"new": {"kind": "similarity", "initial_temperature": 0.5}}
    model, report = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, output_loading_info=True)
    assert report["missing_keys"] == {"objectives.new.projection.weight", "objectives.new.logit_scale"}
    assert float(model.objectives["new"].logit_scale.exp()) == pytest.approx(2)
    assert float(model.objectives["new"].projection.weight.std()) == pytest.approx(32**-0.5 / 3**0.5, rel=0.2)
    trained = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items() if name in trained)


def test_a_model_without_a_run(tmp_path: Path) -> None:
    shape = ModelConfig.model_validate({"transformer": {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16}})
    config = MmctxConfig(vocab_size=50, model=shape)
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.arange(6)[None]).logits.shape == (1, 6, 50)
    model.save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["model_type"] == "mmctx"
    assert tree["model"]["transformer"]["width"] == tree["hidden_size"] == 16
    same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert MmctxConfig().shape == ModelConfig()


@pytest.mark.parametrize("mean", [True, False])
def test_a_vocabulary_grows_and_shrinks(either: Path, tmp_path: Path, mean: bool) -> None:
    model, before = (AutoModelForCausalLM.from_pretrained(either) for _ in range(2))
    known = before.config.vocab_size
    ids = torch.arange(10, 20)[None]
    want = before(ids).logits
    for size in (known + 3, known + 100):
        model.resize_token_embeddings(size, mean_resizing=mean)
        assert model.config.vocab_size == size
        logits = model(ids).logits
        assert logits.shape[2] == size
        torch.testing.assert_close(logits[..., :known], want)
    for table in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        assert len(table.weight) % 64 == 0
        assert len(table.weight) >= size
        drawn = table.weight[known : known + 3]
        assert torch.equal(drawn[0], drawn[1]) == mean
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, logits)
    again.resize_token_embeddings(known)
    torch.testing.assert_close(again(ids).logits, want)


def test_heads_are_tied_or_not(checkpoint: Path, untied: Path) -> None:
    for folder, tied in ((checkpoint, True), (untied, False)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.tie_word_embeddings == tied
        model.tie_weights()
        head = model.get_output_embeddings()
        assert (head is None) == tied
        ids = torch.arange(10, 20)[None]
        before = model(ids).logits
        with torch.no_grad():
            model.get_input_embeddings().weight[5] += 1  # of a token that is not read
        moved = (model(ids).logits != before).any(dim=(0, 1)).nonzero()[:, 0].tolist()
        assert moved == ([5] if tied else [])
