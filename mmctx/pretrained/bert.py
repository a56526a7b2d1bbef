"""BERT (Devlin et al. 2019): learned positions, a norm on the embeddings, norms behind attention and MLP, a dense layer before the head.

Every token is of its first sentence (token type 0), whose embedding is folded into the positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mmctx.model import MmctxModel
from mmctx.objectives.next_sentence import NextSentenceLoss
from mmctx.pretrained.family import Family, Part, affine, block_parts, fused
from mmctx.pretrained.folder import Weights, refuse
from mmctx.pretrained.gpt2 import ACTIVATIONS, BIASED, objections_to
from mmctx.transformer import TransformerConfig


def _shape(config: Any, folder: Path) -> dict[str, Any]:
    if config.hidden_act not in ACTIVATIONS:
        raise refuse(folder, "hidden_act", config.hidden_act, f"known are {', '.join(ACTIVATIONS)}")
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise refuse(folder, "position_embedding_type", kind, "only absolute positions are known")
    if config.add_cross_attention:
        raise refuse(folder, "add_cross_attention", True, "only False is known")
    heads = {"BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel"}  # the classes with `cls.predictions`
    return {
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "mlp_width": config.intermediate_size,
        "activation": ACTIVATIONS[config.hidden_act],
        "learned_positions": config.max_position_embeddings,
        "norm_eps": config.layer_norm_eps,
        "norm_place": "post",
        "embedding_norm": True,
        "head_transform": bool(heads & set(config.architectures or [])),
        "tie_embeddings": config.tie_word_embeddings,
    } | BIASED


def _parts(config: TransformerConfig) -> list[Part]:
    sizes = (config.num_heads * config.head_width,) * 3

    def block(ours: str, layer: int) -> list[Part]:
        theirs = f"encoder.layer.{layer}."
        attention = f"{theirs}attention."
        projections = tuple(f"{attention}self.{name}" for name in ("query", "key", "value"))
        return [
            *fused(f"{ours}attention.qkv", projections, sizes, bias=True),
            *affine(f"{ours}attention.out", f"{attention}output.dense", bias=True),
            *affine(f"{ours}attention_norm", f"{attention}output.LayerNorm", bias=True),
            *affine(f"{ours}mlp.up", f"{theirs}intermediate.dense", bias=True),
            *affine(f"{ours}mlp.down", f"{theirs}output.dense", bias=True),
            *affine(f"{ours}mlp_norm", f"{theirs}output.LayerNorm", bias=True),
        ]

    rest = affine("trunk.embedding_norm", "embeddings.LayerNorm", bias=True)
    if config.head_transform:
        rest += affine("head_transform.dense", "cls.predictions.transform.dense", bias=True)
        rest += affine("head_transform.norm", "cls.predictions.transform.LayerNorm", bias=True)
    return block_parts(config.depth, block, rest)


def _next_sentence(model: MmctxModel, weights: Weights) -> dict[str, Tensor]:
    """BERT's pooler and the probe of its next sentence prediction, for objectives of that kind with `marks: cls`.

    BERT has two logits, first the one for a sentence that follows: their difference is our log-odds.
    """
    found: dict[str, Tensor] = {}
    for name, half in model.objectives.items():
        if not isinstance(half, NextSentenceLoss) or half.pooler is None:
            continue
        for kind in ("weight", "bias"):
            if (pooler := f"pooler.dense.{kind}") in weights:
                found[f"objectives.{name}.pooler.{kind}"] = weights.read(pooler)
            if (probe := f"cls.seq_relationship.{kind}") in weights:
                follows, distant = weights.read(probe).float()
                found[f"objectives.{name}.probe.{kind}"] = (follows - distant)[None]
    return found


def _objections(config: TransformerConfig) -> list[str]:
    return objections_to(config, "bert", {"norm_place": "post", "embedding_norm": True, "head_transform": True})


def _describe(config: TransformerConfig, about: dict[str, Any]) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=about["vocab_size"],
        max_position_embeddings=config.learned_positions,  # type: ignore[arg-type]
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_width,
        hidden_act={"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        layer_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        eos_token_id=about["eos_token_id"],
    )


BERT = Family(
    prefix="bert.",
    layers="encoder.layer.",
    embedding="embeddings.word_embeddings.weight",
    head="cls.predictions.decoder.weight",
    head_biases=("cls.predictions.decoder.bias", "cls.predictions.bias"),
    shape=_shape,
    parts=_parts,
    objections=_objections,
    describe=_describe,
    auto="AutoModelForMaskedLM",
    heads=_next_sentence,
    positions="embeddings.position_embeddings.weight",
    token_types="embeddings.token_type_embeddings.weight",
)
