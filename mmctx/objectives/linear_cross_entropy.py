"""Cross entropy of a linear head without ever holding the (N, V) logits.

Shapes: N labelled tokens, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmctx.pack import IGNORE_INDEX

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits held at a time, by device. CPU: 16 MiB in fp32; four times as many save a tenth of the time. CUDA: 256 MiB keep it busy."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int | None = None,
    label_smoothing: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of `-log softmax(hidden @ weight.T + bias)[label]`, a float32 (or float64) scalar.

    Rows labelled `IGNORE_INDEX` add nothing to the loss or the gradients; better not to pass them at all. Gradients are formed chunk by
    chunk in the forward pass (as in Liger Kernel and Cut Cross Entropy), so memory is one chunk of logits instead of N x V, and
    nothing is computed twice. Products run in the operands' dtype, everything after them in float32. The backward pass hands the
    gradients out instead of copying them, so it runs once.

    Args:
        hidden: (N, D).
        weight: (V, D).
        labels: (N,) int64.
        chunk_size: rows at a time; by default as many as keep `CHUNK_ELEMENTS` logits.
        label_smoothing: e, for the target `(1 - e) onehot + e / V` (Szegedy et al. 2016), as in `F.cross_entropy`.
        bias: (V,), added to the logits in float32.
    """
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and not has_fast_bf16_products():
        hidden, weight = hidden.float(), weight.float()  # faster there, and more exact
    chunk_size = chunk_size or max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 22) // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk_size, label_smoothing)  # type: ignore[no-any-return]


@lru_cache
def has_fast_bf16_products() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones: with AMX tiles it does.

    With AVX-512's bf16 instructions alone they took 1.6 times as long (Xeon, PyTorch 2.14), without these a hundred times. It goes by what
    the processor has, not by a timing, so that the same batch gives the same bits each time.
    """
    return torch.cpu._is_amx_tile_supported()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        smoothing: float,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=precision, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precision) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=precision) if bias is not None and need_bias else None
        shape = min(chunk_size, len(hidden)), len(weight)
        # One buffer for all chunks: each new one would have to be cleared by the system.
        all_products = hidden.new_empty(shape)
        widened = hidden.dtype != precision
        all_logits = hidden.new_empty(shape, dtype=precision) if widened else all_products
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            h = hidden[rows]
            products, logits = all_products[: len(h)], all_logits[: len(h)]  # (C, V)
            torch.mm(h, weight.T, out=products)
            if widened:
                logits.copy_(products)
            if bias is not None:
                logits.add_(bias)
            loss += _sum_and_gradient(logits, labels[rows], smoothing)
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
            if widened:
                products.copy_(logits)
            if grad_hidden is not None:
                torch.mm(products, weight, out=grad_hidden[rows])
            if grad_weight is not None and widened:
                grad_weight += products.T @ h
            elif grad_weight is not None:
                torch.addmm(grad_weight, products.T, h, out=grad_weight)  # unlike addmm_, PyTorch counts its FLOPs
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight, grad_bias), weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy has handed its gradients out: compute the loss anew for a second backward pass"
            )
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden.mul_(upstream.expand(1))  # a (1,) factor is not rounded to bf16
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(upstream).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.mul_(upstream).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _sum_and_gradient(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The loss of a chunk, summed; `logits` (C, V) become its gradient, softmax - target, in place: one exponential and no second chunk."""
    kept = (labels != IGNORE_INDEX)[:, None].to(logits.dtype)  # (C, 1)
    label = labels.clamp(min=0)[:, None]
    largest, aimed_at = logits.amax(dim=-1, keepdim=True), logits.gather(1, label)
    if smoothing:  # the mean logit under the target
        aimed_at = (1 - smoothing) * aimed_at + smoothing * logits.mean(dim=-1, keepdim=True)
    norm = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    logits.mul_(kept / norm).scatter_add_(1, label, -kept * (1 - smoothing))
    if smoothing:
        logits.sub_(kept * (smoothing / logits.shape[1]))
    return ((norm.log() + largest - aimed_at) * kept).sum()
