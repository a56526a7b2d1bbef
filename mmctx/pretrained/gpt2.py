"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before, GELU by tanh, biases everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmctx.pretrained.family import Family, Part, affine, block_parts, differences
from mmctx.pretrained.folder import refuse
from mmctx.transformer import TransformerConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _shape(config: Any, folder: Path) -> dict[str, Any]:
    if config.activation_function not in ACTIVATIONS:
        raise refuse(folder, "activation_function", config.activation_function, f"known are {', '.join(ACTIVATIONS)}")
    for key, plain in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        if getattr(config, key) != plain:
            raise refuse(folder, key, getattr(config, key), f"only {plain} is known")
    return {
        "width": config.n_embd,
        "depth": config.n_layer,
        "num_heads": config.n_head,
        "num_kv_heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "mlp_width": config.n_inner or 4 * config.n_embd,
        "activation": ACTIVATIONS[config.activation_function],
        "learned_positions": config.n_positions,
        "norm_eps": config.layer_norm_epsilon,
        "norm_place": "pre",
        "embedding_norm": False,
        "head_transform": False,
        "tie_embeddings": config.tie_word_embeddings,
    } | BIASED


BIASED = {"mlp_bias": True, "qk_norm": False, "qkv_bias": True, "out_bias": True, "norm": "layer", "windows": [None]}
"""What GPT-2 and BERT have in common."""


def _parts(config: TransformerConfig) -> list[Part]:
    def block(ours: str, layer: int) -> list[Part]:
        theirs = f"h.{layer}."
        return [
            *affine(f"{ours}attention_norm", f"{theirs}ln_1", bias=True),
            *affine(f"{ours}attention.qkv", f"{theirs}attn.c_attn", bias=True, transposed=True),
            *affine(f"{ours}attention.out", f"{theirs}attn.c_proj", bias=True, transposed=True),
            *affine(f"{ours}mlp_norm", f"{theirs}ln_2", bias=True),
            *affine(f"{ours}mlp.up", f"{theirs}mlp.c_fc", bias=True, transposed=True),
            *affine(f"{ours}mlp.down", f"{theirs}mlp.c_proj", bias=True, transposed=True),
        ]

    return block_parts(config.depth, block, affine("trunk.norm", "ln_f", bias=True))


def objections_to(config: TransformerConfig, kind: str, wanted: dict[str, Any]) -> list[str]:
    """What of a trunk GPT-2 or BERT cannot say. Missing biases are zeros."""
    plain = {"qk_norm": False, "norm": "layer", "windows": (None,), "num_kv_heads": config.num_heads}
    resolved = config.model_copy(update={"num_kv_heads": config.kv_heads})
    found = differences(resolved, plain | wanted, kind)
    if config.learned_positions is None:
        found.append(f"learned_positions=None, {kind} has no other")
    if config.activation == "swiglu":
        found.append(f"activation='swiglu', {kind} has gelu or gelu_tanh")
    if config.head_width * config.num_heads != config.width:
        found.append(f"head_dim={config.head_width}, {kind} has width / num_heads = {config.width / config.num_heads}")
    return found


def _objections(config: TransformerConfig) -> list[str]:
    return objections_to(config, "gpt2", {"norm_place": "pre", "embedding_norm": False, "head_transform": False})


def _describe(config: TransformerConfig, about: dict[str, Any]) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=about["vocab_size"],
        n_positions=config.learned_positions,  # type: ignore[arg-type]
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.num_heads,
        n_inner=config.mlp_width,
        activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=about["eos_token_id"],
        eos_token_id=about["eos_token_id"],
    )


GPT2 = Family(
    prefix="transformer.",
    layers="h.",
    embedding="wte.weight",
    head="lm_head.weight",
    head_biases=(),
    shape=_shape,
    parts=_parts,
    objections=_objections,
    describe=_describe,
    positions="wpe.weight",
)
