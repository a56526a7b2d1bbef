"""Losses and gradients of the Transformers face, and peft's adapters on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import flac, png
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

TEXTS = ["<|image|>red cat tall", "<|audio|>blue", "a tall green tree and a small <|image|>blue house"]
TARGETS = ["qkv", "out", "gate_up", "down"]


def example(folder: Path, side: str = "left") -> dict[str, Tensor]:
    """A padded batch with labels as a user would make them: the ids, padding ignored."""
    processor = AutoProcessor.from_pretrained(folder)
    inputs = dict(processor(images=[png(1), png(2)], text=TEXTS, audio=flac(1), padding_side=side))
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_the_cross_entropy_of_its_logits(either: Path, side: str) -> None:
    model, inputs = load(either), example(either, side)
    out = model(**inputs)
    assert out.logits is None  # they are not made unless they are asked for
    labels = inputs["labels"].clone()
    for placeholder in model.placeholder_ids.values():
        labels[labels == placeholder] = -100
    labels[:, 1:][inputs["attention_mask"][:, :-1] == 0] = -100  # of a row's first token
    logits = model(**inputs, logits_to_keep=0).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * count).loss, want / 2)
    got = torch.autograd.grad(out.loss, model.parameters(), allow_unused=True)
    expected = torch.autograd.grad(want, model.parameters(), allow_unused=True)
    for (name, _), one, other in zip(model.named_parameters(), got, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=name)


def test_gradient_checkpointing_changes_no_gradient(either: Path) -> None:
    model, inputs = load(either).train(), example(either)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    plain = torch.autograd.grad(model(**inputs).loss, model.trunk.parameters())
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert all(block.recomputes for block in model.trunk.blocks)
    assert all(map(torch.equal, plain, torch.autograd.grad(model(**inputs).loss, model.trunk.parameters())))
    model.gradient_checkpointing_disable()
    assert not any(block.recomputes for block in model.trunk.blocks)


def descend(model: Any, inputs: dict[str, Tensor], steps: int = 12) -> tuple[float, float]:
    """Losses before and after a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


ADAPTERS = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "lora on embedding and head": peft.LoraConfig(r=4, target_modules=r".*\.qkv|embedding|head", task_type="CAUSAL_LM"),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(target_modules=["qkv", "down"], feedforward_modules=["down"], task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_trains_saves_and_merges(checkpoint: Path, untied: Path, tmp_path: Path, kind: str) -> None:
    folder = untied if kind == "lora on embedding and head" else checkpoint
    inputs = example(folder)
    torch.manual_seed(0)
    model = peft.get_peft_model(load(folder), ADAPTERS[kind])
    frozen = {name: p.clone() for name, p in model.get_base_model().named_parameters() if not p.requires_grad}
    before, after = descend(model, inputs)
    assert after < before - 0.03, (before, after)
    assert all(torch.equal(p, dict(model.get_base_model().named_parameters())[name]) for name, p in frozen.items())
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    read = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        want = model(**read).logits
        torch.testing.assert_close(again(**read).logits, want)
        assert (load(folder)(**read).logits - want).abs().max() > 1e-2
    found, expected = (m.generate(**read, max_new_tokens=4) for m in (again, model))
    assert found.tolist() == expected.tolist()
    if kind == "prefix":
        return
    merged = again.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**read).logits, want, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(**read).logits, merged(**read).logits)


def test_peft_with_checkpointed_blocks(checkpoint: Path) -> None:
    base = load(checkpoint)
    base.gradient_checkpointing_enable()
    model = peft.get_peft_model(base, ADAPTERS["lora"]).train()
    before, after = descend(model, example(checkpoint))
    assert after < before - 0.1
