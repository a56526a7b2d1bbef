"""Weights of Whisper's and AST's encoders from Transformers folders, under the names that our modules have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.encoders.sound_config import ASTConfig, PretrainedSoundConfig, WhisperConfig
from mmctx.encoders.transformers_folder import read_weights
from mmctx.errors import ConfigError

Weights = Mapping[str, Tensor]


def load_sound_weights(encoder: nn.Module, config: PretrainedSoundConfig) -> None:
    """Copies the weights of `config.pretrained` into all of the encoder but its projector.

    Raises:
        ConfigError: they are not there, or do not fit.
    """
    assert config.pretrained is not None
    prefixes, convert = _KINDS[config.kind]
    try:
        found = convert(read_weights(config.pretrained, prefixes), config)
    except KeyError as error:
        raise ConfigError(f"pretrained: {config.pretrained} has no tensor {error} of a {config.kind} encoder") from None
    wanted = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("projector.")}
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise ConfigError(
                f"pretrained: {config.pretrained}: {name} has the shape {tuple(found[name].shape)}, the config makes "
                f"{tuple(tensor.shape)}"
            )
    encoder.load_state_dict(found, strict=False)


def _whisper(weights: Weights, config: WhisperConfig) -> dict[str, Tensor]:
    from mmctx.encoders.audio import sinusoids

    positions = weights["embed_positions.weight"].float()
    fixed = sinusoids(config.max_positions, config.width)
    if positions.shape != fixed.shape or (positions - fixed).abs().max() > 1e-2:  # published ones are rounded to fp16
        raise ConfigError(
            f"pretrained: {config.pretrained}: embed_positions of shape {tuple(positions.shape)} are not Whisper's sinusoids; "
            "trained positions are not supported"
        )
    found = {
        "stem.conv1.weight": weights["conv1.weight"].transpose(1, 2).flatten(1),  # (C, M, taps) -> (C, taps * M)
        "stem.conv1.bias": weights["conv1.bias"],
        "stem.conv2.linear.weight": weights["conv2.weight"].transpose(1, 2).flatten(1),
        "stem.conv2.linear.bias": weights["conv2.bias"],
        **_both("norm", weights, "layer_norm"),
    }
    for layer in range(config.depth):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        q, k, v = (f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        bias = weights[f"{q}.bias"]
        # A bias of keys adds the same to all scores of a query, which the softmax takes off again: Whisper has none.
        found |= {
            f"{ours}.qkv.weight": torch.cat([weights[f"{part}.weight"] for part in (q, k, v)]),
            f"{ours}.qkv.bias": torch.cat([bias, torch.zeros_like(bias), weights[f"{v}.bias"]]),
            **_both(f"{ours}.norm1", weights, f"{theirs}.self_attn_layer_norm"),
            **_both(f"{ours}.out", weights, f"{theirs}.self_attn.out_proj"),
            **_both(f"{ours}.norm2", weights, f"{theirs}.final_layer_norm"),
            **_both(f"{ours}.mlp.0", weights, f"{theirs}.fc1"),
            **_both(f"{ours}.mlp.2", weights, f"{theirs}.fc2"),
        }
    return found


def _ast(weights: Weights, config: ASTConfig) -> dict[str, Tensor]:
    tokens = [weights[f"embeddings.{name}_token"][0] for name in ("cls", "distillation")]
    found = {
        "stem.whole": torch.cat(tokens),
        "stem.patches.weight": weights["embeddings.patch_embeddings.projection.weight"].flatten(1),
        "stem.patches.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "stem.positions": weights["embeddings.position_embeddings"][0],
        **_both("norm", weights, "layernorm"),
    }
    for layer in range(config.depth):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        parts = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            found[f"{ours}.qkv.{kind}"] = torch.cat([weights[f"{part}.{kind}"] for part in parts])
        found |= {
            **_both(f"{ours}.norm1", weights, f"{theirs}.layernorm_before"),
            **_both(f"{ours}.out", weights, f"{theirs}.attention.output.dense"),
            **_both(f"{ours}.norm2", weights, f"{theirs}.layernorm_after"),
            **_both(f"{ours}.mlp.0", weights, f"{theirs}.intermediate.dense"),
            **_both(f"{ours}.mlp.2", weights, f"{theirs}.output.dense"),
        }
    return found


def _both(ours: str, weights: Weights, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


_KINDS: dict[str, tuple[list[str], Callable[[Weights, Any], dict[str, Tensor]]]] = {
    "whisper": (["model.encoder.", "encoder."], _whisper),
    "ast": (["audio_spectrogram_transformer.", ""], _ast),
}
