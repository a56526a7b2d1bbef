"""Cross entropy of a linear head without ever holding the (N, V) logits.

Shapes: N labelled tokens, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmctx.pack import IGNORE_INDEX

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits held at a time, by device: 16 MiB in fp32 stay in a CPU's cache, 256 MiB keep a GPU busy."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None = None) -> Tensor:
    """Sum over tokens of `-log softmax(hidden @ weight.T)[label]`, a float32 (or float64) scalar.

    Rows labelled `IGNORE_INDEX` add nothing to the loss or the gradients; better not to pass them at all. Gradients are formed chunk by
    chunk in the forward pass (as in Liger Kernel and Cut Cross Entropy), so memory is one chunk of logits instead of N x V, and
    nothing is computed twice. Products run in the operands' dtype, everything after them in float32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        labels: (N,) int64.
        chunk_size: rows at a time; by default as many as keep `CHUNK_ELEMENTS` logits.
    """
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk_size = chunk_size or max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 22) // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precision, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precision) if need_weight else None
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            h, label = hidden[rows], labels[rows]
            kept = (label != IGNORE_INDEX)[:, None]  # (C, 1)
            target = label.clamp(min=0)[:, None]
            logits = (h @ weight.T).to(precision)  # (C, V)
            log_norm = logits.logsumexp(dim=-1, keepdim=True)
            loss += ((log_norm - logits.gather(1, target)) * kept).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probabilities = logits.sub_(log_norm).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(log_norm, -1.0))
            grad_logits = probabilities.mul_(kept).to(h.dtype)  # softmax - onehot
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (upstream,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream.expand(1)).to(
                grad_hidden.dtype
            )  # a (1,) factor is not rounded to bf16
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
