"""Sections of `gpu.py` about attention alone.

Shapes: T tokens, H heads, d head dimension, L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_common import DEVICE, attempt, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmctx.attention import BACKENDS, attention
from mmctx.attention.certify import certify
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

Emit = Callable[..., None]
Call = Callable[[Tensor, Tensor, Tensor], Tensor]

FLOPS_A_PAIR = 4 + 10
"""Per head and channel, forward and backward, for each pair of a query and a key that may see each other."""


def certificate(emit: Emit, toy: bool) -> None:
    """Every backend against dense float64, as `mmctx doctor` does."""
    for found in certify(DEVICE, timing=not toy).certificates:
        worst = found.worst
        emit(
            case=f"{found.backend}, {found.dtype}",
            passed=found.passed,
            why_not=found.why_not,
            worst_error=None if worst is None else worst.worst,
            milliseconds=found.milliseconds,
        )


def inputs(tokens: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (T, H, d) in bf16, whose gradients are wanted."""
    q, k, v = (torch.randn(tokens, heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def usable(head_dim: int) -> list[str]:
    """Backends that can serve bf16 here; the certificate says why the others cannot."""
    names, layout, tensors = [], DocumentLayout.from_lengths([8], 1, DEVICE), inputs(8, 1, head_dim)
    for name in BACKENDS:
        try:
            attention(*tensors, layout, backend=name)
        except BackendError:
            continue
        names.append(name)
    return names


def timed(call: Call, tensors: tuple[Tensor, Tensor, Tensor], repeats: int) -> float:
    """Seconds, forward and backward."""
    grad = torch.randn_like(tensors[0])
    return seconds(lambda: torch.autograd.grad(call(*tensors), tensors, grad), repeats)


def crossover(emit: Emit, toy: bool) -> None:
    """Documents of one length, the same number of tokens in all: from which length on SDPA one by one overtakes varlen kernels."""
    total, heads, head_dim = (128, 2, 16) if toy else (65_536, 16, 128)
    lengths = (16, 64) if toy else (128, 512, 1024, 2048, 4096, 8192, 32_768)
    names = usable(head_dim)
    for length in lengths:
        layout = DocumentLayout.from_lengths([length] * (total // length), total // length, DEVICE)
        tensors = inputs(total, heads, head_dim)
        for name in names:
            call = partial(attention, layout=layout, backend=name)
            attempt(
                emit,
                f"{total // length} x {length}, {name}",
                lambda call=call, tensors=tensors: {"milliseconds": round(1e3 * timed(call, tensors, 3), 3)},
            )


def dense(kernel: SDPBackend) -> Call:
    """PyTorch's SDPA of one causal document by one of its kernels, with nothing of ours around it."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)
        return out[0].transpose(0, 1)

    return call


def attention_speed(emit: Emit, toy: bool) -> None:
    """TFLOP/s of one causal document by length, forward and backward: our backends, and SDPA's kernels directly."""
    lengths, heads, head_dim = ((64,), 2, 16) if toy else ((1024, 4096, 16_384, 65_536, 131_072), 16, 128)
    kernels = (SDPBackend.FLASH_ATTENTION,) if toy else (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    names = usable(head_dim)
    direct = {f"SDPA {kernel.name}": dense(kernel) for kernel in kernels}
    for length in lengths:
        layout = DocumentLayout.from_lengths([length], 1, DEVICE)
        tensors = inputs(length, heads, head_dim)
        calls: dict[str, Call] = {name: partial(attention, layout=layout, backend=name) for name in names}
        flops = FLOPS_A_PAIR * heads * head_dim * (length * (length + 1) // 2)

        def measure(call: Call, tensors=tensors, flops=flops) -> dict[str, float]:
            taken = timed(call, tensors, 3)
            return {"milliseconds": round(1e3 * taken, 3), "tflops": round(flops / taken / 1e12, 1)}

        for name, call in (calls | direct).items():
            attempt(emit, f"{length} tokens, {name}", partial(measure, call))
