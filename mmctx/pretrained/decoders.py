"""Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, SwiGLU. They differ in biases, query/key norm and windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmctx.errors import ConfigError
from mmctx.pretrained.family import Family, Part, affine, block_parts, differences, fused
from mmctx.pretrained.folder import refuse
from mmctx.pretrained.rope_parameters import read_rope, write_rope
from mmctx.transformer import TransformerConfig


def _shape(config: Any, folder: Path) -> dict[str, Any]:
    if config.hidden_act != "silu":
        raise refuse(folder, "hidden_act", config.hidden_act, "this family is known with silu alone")
    kind, biased = config.model_type, bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "mlp_width": config.intermediate_size,
        "activation": "swiglu",
        "mlp_bias": bool(getattr(config, "mlp_bias", False)) if kind == "llama" else False,
        "rope": read_rope(config, folder),
        "learned_positions": None,
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2" or (kind in ("llama", "qwen3") and biased),
        "out_bias": kind in ("llama", "qwen3") and biased,
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "norm_place": "pre",
        "embedding_norm": False,
        "head_transform": False,
        "tie_embeddings": config.tie_word_embeddings,
        "windows": _windows(config, folder),
    }


def _windows(config: Any, folder: Path) -> list[int | None]:
    """Of each layer, as the shortest pattern that repeats. Their windows hold a token itself, as ours do."""
    if config.model_type == "llama":
        return [None]
    if config.model_type == "mistral":
        return [config.sliding_window]
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    if unknown := sorted(set(config.layer_types) - known.keys()):
        raise refuse(folder, "layer_types", unknown[0], f"known are {', '.join(known)}")
    windows = [known[kind] for kind in config.layer_types]
    lengths = range(1, len(windows) + 1)
    period = next(n for n in lengths if all(w == windows[i % n] for i, w in enumerate(windows)))
    return windows[:period]


def _parts(config: TransformerConfig) -> list[Part]:
    head, heads, kv_heads = config.head_width, config.num_heads, config.kv_heads
    qkv, mlp = (heads * head, kv_heads * head, kv_heads * head), (config.mlp_width,) * 2

    def block(ours: str, layer: int) -> list[Part]:
        attention, feed_forward = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        projections = tuple(f"{attention}{name}_proj" for name in "qkv")
        gates = (f"{feed_forward}gate_proj", f"{feed_forward}up_proj")
        norms = [(f"{ours}attention.{name}", f"{attention}{name}") for name in ("q_norm", "k_norm")]
        return [
            *fused(f"{ours}attention.qkv", projections, qkv, config.qkv_bias),
            *affine(f"{ours}attention.out", f"{attention}o_proj", config.out_bias),
            *(part for norm in norms if config.qk_norm for part in affine(*norm, bias=False)),
            *fused(f"{ours}mlp.gate_up", gates, mlp, config.mlp_bias),
            *affine(f"{ours}mlp.down", f"{feed_forward}down_proj", config.mlp_bias),
            *affine(f"{ours}attention_norm", f"layers.{layer}.input_layernorm", bias=False),
            *affine(f"{ours}mlp_norm", f"layers.{layer}.post_attention_layernorm", bias=False),
        ]

    return block_parts(config.depth, block, affine("trunk.norm", "norm", bias=False))


def _objections(config: TransformerConfig, kind: str) -> list[str]:
    """Whatever the target, one line for each field that it cannot say."""
    wanted = {
        "norm": "rms",
        "norm_place": "pre",
        "activation": "swiglu",
        "learned_positions": None,
        "embedding_norm": False,
        "head_transform": False,
        "qk_norm": kind == "qwen3",
    }
    wanted |= {} if kind == "llama" else {"mlp_bias": False}
    wanted |= {"qkv_bias": False, "out_bias": False} if kind == "mistral" else {}
    wanted |= {"out_bias": False} if kind == "qwen2" else {}
    found = differences(config, wanted, kind)
    sizes = {config.layer_window(layer) for layer in range(config.depth)}
    if kind == "llama" and sizes != {None}:
        found.append(f"windows={list(config.windows)}, llama has none; mistral, qwen2 and qwen3 have")
    elif kind == "mistral" and len(sizes) > 1:
        found.append(
            f"windows={list(config.windows)}, mistral has one for all layers; qwen2 and qwen3 mix them with none"
        )
    elif len(sizes - {None}) > 1:
        found.append(f"windows={list(config.windows)}, {kind} has one size beside none")
    return found


def _describe(config: TransformerConfig, about: dict[str, Any], kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    tree: dict[str, Any] = {
        "vocab_size": about["vocab_size"],
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config.rope, config.head_width),
        "max_position_embeddings": about["context_length"],
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": about["eos_token_id"],
    }
    windows = [config.layer_window(layer) for layer in range(config.depth)]
    size = max((window for window in windows if window is not None), default=None)
    if kind == "mistral":
        tree["sliding_window"] = size
    if kind in ("qwen2", "qwen3"):
        tree |= {"use_sliding_window": size is not None, "sliding_window": size}
        tree["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        # vLLM reads windows off this number: the first layers are full, the others have them
        tree["max_window_layers"] = next((n for n, window in enumerate(windows) if window is not None), config.depth)
    if kind in ("llama", "qwen3"):
        tree["attention_bias"] = config.qkv_bias or config.out_bias
    if kind == "llama":
        tree["mlp_bias"] = config.mlp_bias
    try:
        return CONFIG_MAPPING[kind](**tree)
    except Exception as error:  # of Transformers' own validation
        raise ConfigError(f"Transformers takes no {kind} of this shape: {error}") from None


def decoder(kind: str) -> Family:
    """One of `llama`, `mistral`, `qwen2` and `qwen3`."""
    return Family(
        prefix="model.",
        layers="layers.",
        embedding="embed_tokens.weight",
        head="lm_head.weight",
        head_biases=(),
        shape=_shape,
        parts=_parts,
        objections=lambda config: _objections(config, kind),
        describe=lambda config, about: _describe(config, about, kind),
    )
