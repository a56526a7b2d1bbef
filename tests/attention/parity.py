"""What the attention tests share: inputs, forward and backward, and the comparison with the dense reference."""

from __future__ import annotations

import torch
from torch import Tensor

from mmctx.attention import attention
from mmctx.attention.reference import reference_attention
from mmctx.layout import DocumentLayout


def make_inputs(
    layout: DocumentLayout,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    head_dim: int = 16,
    dtype=torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v as leaves, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    device = layout.cu_seqlens.device
    q, k, v, grad = (
        torch.randn(layout.num_tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def run(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """(output, grad_q, grad_k, grad_v)"""
    out = function(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)))


def assert_equals_reference(
    layout: DocumentLayout, window: int | None, backend: str, tolerance: float, **inputs
) -> None:
    q, k, v, grad = make_inputs(layout, **inputs)
    found = run(lambda q, k, v: attention(q, k, v, layout, window=window, backend=backend), q, k, v, grad)
    expected = run(lambda q, k, v: reference_attention(q, k, v, layout, window), q, k, v, grad)
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), found, expected, strict=True):
        assert a.dtype == q.dtype
        assert a.shape == b.shape
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)).item()
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"
