"""One training step of one document, and the memory it took: `memory_side.py SETTINGS` with JSON settings; see `memory.py`."""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmctx.activations import ActivationsConfig
from mmctx.layout import DocumentLayout
from mmctx.model import MmctxModel, ModelConfig
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.pack import IGNORE_INDEX, PackedBatch
from mmctx.train.peak import measure_peak
from mmctx.transformer import TransformerConfig


def build_theirs(sizes: dict[str, int]) -> LlamaForCausalLM:
    """Transformers' Llama with weights from a seed, its attention by SDPA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["mlp_width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        tie_word_embeddings=True,
        max_position_embeddings=1 << 17,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).train()


def build_ours(sizes: dict[str, int], windows: list[int | None], theirs: LlamaForCausalLM) -> MmctxModel:
    """Our trunk of the same shape, with the same weights."""
    transformer = TransformerConfig.model_validate(
        {
            "width": sizes["width"],
            "depth": sizes["depth"],
            "num_heads": sizes["heads"],
            "mlp_width": sizes["mlp_width"],
            "qk_norm": False,
            "norm_eps": theirs.config.rms_norm_eps,
            "windows": windows,
        }
    )
    model = MmctxModel(ModelConfig(transformer=transformer), {"captioning": CaptioningConfig()}, sizes["vocab"])
    with torch.no_grad():
        model.embedding.weight.copy_(theirs.model.embed_tokens.weight)
        for ours, layer in zip(model.trunk.blocks, theirs.model.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            ours.attention.qkv.weight.copy_(torch.cat(projections))
            ours.attention.out.weight.copy_(attention.o_proj.weight)
            ours.mlp.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            ours.mlp.down.weight.copy_(mlp.down_proj.weight)
    return model.train()


def one_document(ids: torch.Tensor) -> PackedBatch:
    """The batch that the packer would make of (T,) ids: every token but the first is predicted."""
    labels = torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(len(ids)),
        layout=DocumentLayout.from_lengths([len(ids)], 1),
        objectives=("captioning",),
        label_positions={"captioning": torch.arange(len(ids) - 1)},
    )


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    sizes, tokens = settings["sizes"], settings["tokens"]
    torch.set_num_threads(settings["threads"])
    theirs = build_theirs(sizes)
    ids = torch.randint(0, sizes["vocab"], (tokens,), generator=torch.Generator().manual_seed(1))
    if settings["side"] == "transformers":
        model: torch.nn.Module = theirs
        if settings["checkpoint"]:
            theirs.gradient_checkpointing_enable({"use_reentrant": False})

        def loss() -> torch.Tensor:
            return theirs(input_ids=ids[None], labels=ids[None]).loss
    else:
        model = ours = build_ours(sizes, settings["windows"], theirs)
        ours.set_activations(ActivationsConfig(**settings["activations"]))
        batch = one_document(ids)
        del theirs

        def loss() -> torch.Tensor:
            found = ours.losses(batch)["captioning"]
            return found.total / found.count

    for parameter in model.parameters():  # gradients are there: what is measured beyond them is activations
        parameter.grad = torch.zeros_like(parameter)
    found: list[float] = []

    def step() -> None:
        value = loss()
        value.backward()
        found.append(value.item())

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = measure_peak(step)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    print(json.dumps({"peak": peak, "resident": grown, "loss": found[0], "gradient": norm}))


if __name__ == "__main__":
    main()
