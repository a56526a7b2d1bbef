"""The output head, which peft may have wrapped and accelerate may keep elsewhere.

Shapes: N hidden states, D width, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmctx.model import MmctxModel
from mmctx.objectives.linear_cross_entropy import linear_cross_entropy

_ROWS = 1024
"""Logits (N, V) of a wrapped head that exist at once, in rows."""


def next_token_logits(model: MmctxModel, hidden: Tensor) -> Tensor:
    """(N, D) -> (N, V)."""
    states, bias = _transformed(model, hidden)
    if model.head is not None:
        logits = model.head(states)[:, : model.vocab_size]
    else:
        with _at_hand(model.embedding):
            logits = states @ model.head_weight[: model.vocab_size].T
    return logits if bias is None else logits + bias


def sum_of_losses(model: MmctxModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropies of targets (N,) after hidden states (N, D), summed; logits exist in chunks alone."""
    if model.head is None or type(model.head) is nn.Linear:
        states, bias = _transformed(model, hidden)
        with _at_hand(model.embedding if model.head is None else model.head):
            return linear_cross_entropy(states, model.head_weight[: model.vocab_size], targets, bias=bias)

    def of_part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(next_token_logits(model, states).float(), wanted, reduction="sum")

    parts = zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
    losses: list[Any] = [checkpoint(of_part, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() if losses else hidden.sum() * 0


def _transformed(model: MmctxModel, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the matrix reads, and the biases of the logits (V,), see `HeadTransform`."""
    transform = model.head_transform
    return (hidden, None) if transform is None else (transform(hidden), transform.bias[: model.vocab_size])


def _at_hand(module: nn.Module) -> Any:
    """Brings in weights that accelerate keeps elsewhere, for uses that are no call of the module."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
