"""The shape of a pretrained trunk from its folder, and what a run may say beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmctx.errors import ConfigError
from mmctx.pretrained.bert import BERT
from mmctx.pretrained.decoders import decoder
from mmctx.pretrained.family import Family
from mmctx.pretrained.folder import KEY, read_config, refuse
from mmctx.pretrained.gpt2 import GPT2
from mmctx.transformer import TransformerConfig

FAMILIES: dict[str, Family] = {
    "llama": decoder("llama"),
    "mistral": decoder("mistral"),
    "qwen2": decoder("qwen2"),
    "qwen3": decoder("qwen3"),
    "gpt2": GPT2,
    "bert": BERT,
}
"""By the `model_type` of `config.json`."""


def read_shape(folder: Path, rope_is_given: bool = False) -> dict[str, Any]:
    """Fields of `TransformerConfig` that a folder determines.

    Args:
        folder: of a Transformers model.
        rope_is_given: the scaling of its positions is of no account.

    Raises:
        ConfigError: it holds no model of a known family, or one with a feature that the trunk does not have.
    """
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        remedy = f"known families are {', '.join(FAMILIES)}"
        raise refuse(folder, "model_type", config.model_type, remedy)
    if rope_is_given and getattr(config, "rope_parameters", None):
        config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    return FAMILIES[config.model_type].shape(config, folder)


def fill_in(tree: Mapping[str, Any], build: Callable[[Any], TransformerConfig]) -> TransformerConfig:
    """The config of a tree that names a folder: its shape, with what may be changed on purpose as the tree has it.

    Raises:
        ConfigError: the tree contradicts the folder, or the folder cannot be used.
    """
    folder = Path(tree["pretrained"])
    rope = tree.get("rope") or {}
    shape = read_shape(folder, rope_is_given=isinstance(rope, Mapping) and "scaling" in rope)
    merged = shape | {name: value for name, value in tree.items() if value is not None}
    if "rope" in shape and isinstance(rope, Mapping):
        merged["rope"] = shape["rope"] | rope
    config = build(merged)
    check_agrees(config, shape, folder)
    return config


def check_agrees(config: TransformerConfig, shape: dict[str, Any], folder: Path) -> None:
    """Looks for fields that a folder determines and the config has otherwise.

    Raises:
        ConfigError: there is one; it names both values.
    """
    theirs = TransformerConfig.model_validate({**shape, "rope": {}})
    for name in shape.keys() - {"rope", "windows"}:
        ours, of_folder = getattr(config, name), getattr(theirs, name)
        if name == "learned_positions" and ours and of_folder:
            continue
        if ours != of_folder:
            raise ConfigError(
                f"model.transformer.{name}={ours!r}, but the weights of {KEY}={str(folder)!r} have {of_folder!r}; remove the key, "
                "or name another folder"
            )
