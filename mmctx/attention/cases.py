"""What a backend is certified on: small layouts, made so that the usual mistakes show, against the dense reference.

A document that sees its neighbour, a window that is off by one, a lost causal flag, grouped heads read in the wrong
order, an edge of a block.

Shapes: T tokens, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmctx.attention.backend import AttentionFunction
from mmctx.attention.reference import reference_attention
from mmctx.layout import DocumentLayout

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""Largest error allowed, relative to the largest magnitude of the reference. Each is a few roundings of its type: the
inputs of the reference are rounded first, so that only the computation differs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One layout to certify on; `lengths`, `num_causal` and `window` as in `DocumentLayout` and `attention`."""

    name: str
    lengths: tuple[int, ...]
    num_causal: int
    window: int | None = None
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64


CASES: tuple[Case, ...] = (
    Case("causal", (17, 40, 5, 33, 64), 5),
    Case("bidirectional", (17, 40, 5, 33, 64), 0),
    Case("mixed", (31, 16, 16, 45, 16, 16, 23), 4),
    Case("causal window", (50, 7, 129, 8, 20), 5, window=7),
    Case("bidirectional window", (50, 7, 129, 8, 20), 0, window=7),
    Case("mixed window", (300, 1, 40, 270, 33, 30), 3, window=16),
    Case("window of one", (5, 40, 1, 300, 33, 290), 3, window=1),
    Case("window one short of the document", (33, 34, 12, 33, 34), 3, window=33),
    Case("window as long as the document", (33, 20, 33, 33, 8), 3, window=33),
    Case("window across blocks", (150, 401, 290, 70), 2, window=130),
    Case("grouped heads", (40, 9, 30, 12), 2, num_heads=8, num_kv_heads=2),
    Case("grouped heads, window", (40, 9, 30, 12), 2, window=5, num_heads=6, num_kv_heads=3),
    Case("one-token documents", (1, 1, 9, 1, 1, 6, 1), 4),
    Case("very uneven", (2, 400, 1, 3, 150, 4), 3),
    # Fused kernels are compiled for each head dimension, or for a range of them.
    Case("head dimension 32", (50, 130, 7, 140), 2, window=40, head_dim=32),
    Case("head dimension 96", (50, 130, 7, 140), 2, num_kv_heads=2, head_dim=96),
    Case("head dimension 128", (50, 130, 7, 140), 2, num_kv_heads=2, head_dim=128),
    Case("head dimension 128, window", (50, 300, 7, 140), 2, window=40, num_kv_heads=2, head_dim=128),
    Case("head dimension 256", (50, 130, 7, 140), 2, head_dim=256),
)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The largest errors of one case over the largest magnitude of the reference; NaN where a value is not finite."""

    case: str
    forward: float
    grad_q: float
    grad_k: float
    grad_v: float

    @property
    def backward(self) -> float:
        """The largest of the three gradients' errors; infinite where any is NaN."""
        return _largest(self.grad_q, self.grad_k, self.grad_v)

    @property
    def worst(self) -> float:
        """The largest of the four; infinite where any is NaN, so that it never passes."""
        return _largest(self.forward, self.grad_q, self.grad_k, self.grad_v)


def _largest(*errors: float) -> float:
    return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def run_case(function: AttentionFunction, case: Case, device: torch.device, dtype: torch.dtype) -> CaseResult:
    """Forward and backward of `function` on one case, held against the reference."""
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal, device)
    q, k, v, grad = make_inputs(layout, case.num_heads, case.num_kv_heads, case.head_dim, dtype)
    out, *grads = with_gradients(function(q, k, v, layout, case.window), (q, k, v), grad)
    expected_out, *expected_grads = with_gradients(
        reference_attention(q, k, v, layout, case.window), (q, k, v), grad.double()
    )
    # Gradients that all but vanish, as of q and k under a window of one, are held against the others: a kernel gets
    # them as small differences of what it has rounded.
    floor = max(expected.abs().max().item() for expected in expected_grads) / 4
    errors = [_error(a, b, floor) for a, b in zip(grads, expected_grads, strict=True)]
    return CaseResult(case.name, _error(out, expected_out, 0.0), *errors)


def make_inputs(
    layout: DocumentLayout, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (T, Hq, d), k and v (T, Hk, d), and the gradient of the output; the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        x = torch.randn(layout.num_tokens, heads, head_dim, generator=generator)
        return x.to(layout.cu_seqlens.device, dtype)

    q, k, v = (normal(heads).requires_grad_() for heads in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v, normal(num_heads)


def with_gradients(out: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """(out, gradient of each input)"""
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def _error(found: Tensor, expected: Tensor, floor: float) -> float:
    """Largest difference over the largest magnitude expected: of single elements near zero, a relative error says nothing."""
    expected = expected.double()
    difference = (found.double() - expected).abs().max()
    return (difference / expected.abs().max().clamp_min(max(floor, torch.finfo(torch.float64).tiny))).item()
