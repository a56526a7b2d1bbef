"""Tuned checkpoints opened by Transformers: whole, and by peft onto their base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tuning import base, base_tree, kind, only, tuned  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM, DynamicCache

from mmctx.errors import CheckpointError, ConfigError
from mmctx.generate import generate
from mmctx.hf import MmctxForConditionalGeneration
from mmctx.pack import Document, pack_documents
from mmctx.train.checkpoints.load import load_model, load_weights

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Longer than the window of one layer."""
    return torch.randint(5, 250, (3, 50), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(tuned: Path) -> Any:  # noqa: F811
    """A checkpoint of each kind, opened."""
    return AutoModelForCausalLM.from_pretrained(tuned / "latest")


def packed(ids: torch.Tensor) -> Any:
    return pack_documents([Document("captioning", row.numpy(), np.full(len(row), -100), True) for row in ids], {})


@torch.no_grad()
def native_logits(run: Path, ids: torch.Tensor) -> torch.Tensor:
    ours, _, _ = load_model(run)
    return ours.next_token_logits(ours.encode(packed(ids))).view(*ids.shape, -1)


@torch.no_grad()
def test_a_checkpoint_is_opened_as_a_whole(whole: Any, tuned: Path, base: Path, ids: torch.Tensor) -> None:  # noqa: F811
    want = native_logits(tuned, ids)
    assert type(whole) is MmctxForConditionalGeneration
    assert not any(module.training for module in whole.modules())
    torch.testing.assert_close(whole(input_ids=ids).logits, want, rtol=0, atol=1e-5)
    of_base = MmctxForConditionalGeneration.from_pretrained(base / "latest")(input_ids=ids).logits
    assert not torch.allclose(of_base, want, atol=1e-3)
    half = MmctxForConditionalGeneration.from_pretrained(tuned / "latest", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    coarse = half(input_ids=ids).logits.float()
    assert (coarse - want).norm() < 0.3 * (of_base - want).norm()


@torch.no_grad()
def test_it_writes_what_the_run_writes(whole: Any, tuned: Path, ids: torch.Tensor) -> None:  # noqa: F811
    told = whole.generate(input_ids=ids, **GREEDY)
    ours, _, _ = load_model(tuned)
    assert told[:, ids.shape[1] :].tolist() == generate(ours, packed(ids), -1, 5)
    padded = torch.cat([torch.full((3, 2), 7), ids], dim=1)
    mask = torch.tensor([0, 0] + [1] * 50).expand(3, -1)
    assert whole.generate(input_ids=padded, attention_mask=mask, **GREEDY)[:, 2:].tolist() == told.tolist()
    without = whole.generate(input_ids=ids, use_cache=False, num_beams=3, **GREEDY)
    assert whole.generate(input_ids=ids, num_beams=3, **GREEDY).tolist() == without.tolist()


@torch.no_grad()
def test_a_cache_is_gone_on_with(whole: Any, ids: torch.Tensor) -> None:
    """By several tokens at once, by `generate` in a second turn, and after its end was taken back."""
    want, cache = whole(input_ids=ids).logits, DynamicCache(config=whole.config)
    whole(input_ids=ids[:, :44], past_key_values=cache)
    assert cache.get_seq_length() == 44
    torch.testing.assert_close(
        whole(input_ids=ids[:, 44:], past_key_values=cache).logits, want[:, 44:], rtol=0, atol=1e-5
    )
    cache.crop(-3)
    turned = whole.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    assert turned.tolist() == whole.generate(input_ids=ids, **GREEDY).tolist()


@torch.no_grad()
def test_it_is_saved_as_it_is(whole: Any, tuned: Path, kind: str, ids: torch.Tensor, tmp_path: Path) -> None:  # noqa: F811
    whole.save_pretrained(tmp_path)
    again, report = MmctxForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert again.config.run["train"]["tune"]["kind"] == ("full" if kind in ("lora", "adalora") else kind)
    if kind in ("prefix", "adapter"):  # what Transformers writes a run's model reads
        ours, _, _ = load_model(tuned)
        want = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        for parameter in ours.parameters():
            parameter.zero_()
        load_weights(ours, tmp_path)
        assert all(torch.equal(tensor, want[name]) for name, tensor in ours.state_dict().items())


def test_what_cannot_be_put_onto_its_base(tuned: Path, base: Path, kind: str, tmp_path: Path) -> None:  # noqa: F811
    only(kind, "lora", "adapter")
    plain = MmctxForConditionalGeneration.from_pretrained(base / "latest")
    split: Any = {n: "cpu" for n, _ in plain.named_modules() if n.count(".") == 1} | {"embedding": "disk"}
    split |= {name: "cpu" for name, _ in plain.named_children() if name in ("head", "head_transform")}
    with pytest.raises(ConfigError, match=f"train.tune.kind={kind}, which .* on one device.* mmctx merge"):
        MmctxForConditionalGeneration.from_pretrained(tuned / "latest", device_map=split, offload_folder=tmp_path / "o")
    shutil.copytree(tuned / "latest", tmp_path / "cut", symlinks=False)
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    lost = next(name for name in sorted(tensors) if "lora_B" in name or "bottleneck" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {lost}"):
        MmctxForConditionalGeneration.from_pretrained(tmp_path / "cut")


@torch.no_grad()
def test_peft_puts_the_adapter_onto_the_base(tuned: Path, base: Path, kind: str, ids: torch.Tensor) -> None:  # noqa: F811
    if kind == "adapter":
        pytest.skip("peft knows no bottlenecks")
    plain = MmctxForConditionalGeneration.from_pretrained(base / "latest")
    theirs = peft.PeftModel.from_pretrained(plain, str(tuned / "latest" / "adapter")).eval()
    found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, native_logits(tuned, ids), rtol=0, atol=1e-5)
