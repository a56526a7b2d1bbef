"""A vocabulary that grows: rows of the input embedding and of the output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmctx.model import VOCAB_MULTIPLE


class VocabularyMixin:
    """Embeddings in and out, for a model whose tables have more rows than its vocabulary has ids."""

    config: Any
    native: Any
    embedding: nn.Embedding

    def get_input_embeddings(self) -> nn.Embedding:
        """The input embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Puts another one in its place; a tied head is this one, too."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output head; None where it is the input embedding."""
        return getattr(self, "head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Puts another head in its place."""
        self.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Makes room for `new_num_tokens` ids, or takes some away; known ids keep their rows, bit for bit.

        Args:
            new_num_tokens: size of the vocabulary; None changes nothing.
            pad_to_multiple_of: tables are rounded up to multiples of `VOCAB_MULTIPLE` anyway.
            mean_resizing: new rows start as the mean of the known ones (Hewitt 2021), which disturbs the known tokens' probabilities least;
                else they are drawn at random.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.embedding
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size = -(-size // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        for module in (self.embedding, self.get_output_embeddings()):
            if module is not None:
                _resize(module, self.config.vocab_size, size, mean_resizing)
        if (transform := self.native.head_transform) is not None:
            _resize_bias(transform, self.config.vocab_size, size)
        self.config.vocab_size = size
        return self.embedding


@torch.no_grad()
def _resize(module: Any, known: int, size: int, mean: bool) -> None:
    old: Tensor = module.weight
    rows = _rows(size)
    weight = old.new_empty(rows, old.shape[1]).normal_(std=0.02)
    weight[: min(known, rows)] = old[: min(known, rows)]
    if mean and size > known:
        weight[known:size] = old[:known].float().mean(dim=0).to(weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    for name in ("num_embeddings", "out_features"):
        if hasattr(module, name):
            setattr(module, name, rows)


@torch.no_grad()
def _resize_bias(transform: Any, known: int, size: int) -> None:
    old: Tensor = transform.bias
    bias = old.new_zeros(_rows(size))
    bias[: min(known, len(bias))] = old[: min(known, len(bias))]
    transform.bias = nn.Parameter(bias, requires_grad=old.requires_grad)


def _rows(size: int) -> int:
    """Of the tables for so many ids."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
