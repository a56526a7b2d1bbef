"""What a family of pretrained models is: how its shape, its tensors and its configuration are said in our words, and in its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmctx.transformer import TransformerConfig


class Part(NamedTuple):
    """One of our tensors and those of theirs that it is made of, laid end to end along their rows."""

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    """Rows of each of theirs, where they are several."""
    transposed: bool = False
    """Theirs are stored (in, out), as GPT-2's."""

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Ours, of theirs."""
        return torch.cat([tensor.T if self.transposed and tensor.ndim == 2 else tensor for tensor in tensors])

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs, of ours."""
        pieces = tensor.split(self.sizes) if self.sizes else (tensor,)
        turned = [piece.T if self.transposed and piece.ndim == 2 else piece for piece in pieces]
        return dict(zip(self.theirs, turned, strict=True))


class Family(NamedTuple):
    """Models of one `model_type`."""

    prefix: str
    """What the class with a head puts before the trunk's tensors."""
    layers: str
    """Start of the names of tensors inside blocks: all of these must be understood."""
    embedding: str
    head: str
    """Names of the token embedding and of an untied output head."""
    head_biases: tuple[str, ...]
    """Names of the biases on the logits, with `head_transform`: the first that is there counts."""
    shape: Callable[[Any, Path], dict[str, Any]]
    """Their configuration, and the folder for errors -> fields of `TransformerConfig`."""
    parts: Callable[[TransformerConfig], list[Part]]
    """Everything but embeddings and head."""
    objections: Callable[[TransformerConfig], list[str]]
    """What of a trunk the family cannot say."""
    describe: Callable[[TransformerConfig, dict[str, Any]], Any]
    """A trunk, and `vocab_size`, `context_length` and `eos_token_id` -> their configuration."""
    auto: str = "AutoModelForCausalLM"
    """Transformers' class that loads it."""
    positions: str | None = None
    """Name of the learned positions."""
    heads: Callable[[Any, Any], dict[str, Tensor]] | None = None
    """`(model, weights)` -> what the folder knows of heads of single objectives, by our names."""
    token_types: str | None = None
    """Name of BERT's embeddings of the first and second sentence. We have no second: its first row is added to the positions."""


def block_parts(depth: int, parts: Callable[[str, int], list[Part]], final: list[Part]) -> list[Part]:
    """The parts of every block, then `final`; `parts` takes our block's path with a dot behind, and its number."""
    return [part for layer in range(depth) for part in parts(f"trunk.blocks.{layer}.", layer)] + final


def affine(ours: str, theirs: str, bias: bool, transposed: bool = False) -> list[Part]:
    """A matrix or a norm with its bias, if it has one."""
    named = [Part(f"{ours}.{name}", (f"{theirs}.{name}",), (), transposed) for name in ("weight", "bias")]
    return named if bias else named[:1]


def fused(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...], bias: bool) -> list[Part]:
    """Several of their linear layers that are one of ours."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Part(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), sizes) for kind in kinds]


def differences(config: TransformerConfig, wanted: dict[str, Any], kind: str) -> list[str]:
    """One line for each field that a family has otherwise."""
    return [
        f"{name}={value!r}, {kind} has {want!r}"
        for name, want in wanted.items()
        if (value := getattr(config, name)) != want
    ]
