"""Sliding windows on a dense kernel without the work outside them: blocks of queries, each with the keys in reach.

Arithmetic and memory grow with the length times the window, not with the square of the length.

Shapes: B documents, L tokens of each, H heads, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MIN_BLOCK = 128
# Smaller blocks waste less beyond the window, but each is a call. Half a window is where both cost the least on a CPU.
_ALIGNMENT = 8  # fused CUDA kernels want masks whose rows are a multiple of this

DenseCall = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(q (B, Hq, m, d), k and v (B, Hk, n, d), mask (m, n) to be added) -> (B, Hq, m, d)`."""


def is_worth_blocks(length: int, window: int) -> bool:
    """Whether a document of `length` tokens is long enough beside the window to be cut into blocks."""
    return length > 2 * max(window, _MIN_BLOCK)


def band(queries: Tensor, keys: Tensor, window: int, causal: bool) -> Tensor:
    """(len(queries), len(keys)) bool: which key positions lie in the window of which query positions."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, causal: bool, attend: DenseCall) -> Tensor:
    """Windowed attention (B, Hq, L, d) of q (B, Hq, L, d), k and v (B, Hk, L, d): `attend` serves one block of queries."""
    length = q.shape[2]
    size = max(_rounded_up(-(-window // 2)), _MIN_BLOCK)
    before = _rounded_up(window - 1)
    after = 0 if causal else before
    starts = range(0, length, size)
    spans = tuple((max(start - before, 0), min(start + size + after, length)) for start in starts)
    # Positions count from the first key that an inner block reaches, so that one mask serves every block. They are made
    # on the device: a copy from the host would wait for it in every layer.
    positions = torch.arange(before + size + after, device=q.device)
    seen = band(positions[before : before + size], positions, window, causal)
    # Added to the scores: of a bool mask PyTorch would make and keep such a tensor in every call.
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    blocks = zip(starts, spans, q.split(size, dim=2), _Spans.apply(k, spans), _Spans.apply(v, spans), strict=True)
    outputs = []
    for start, (first, _), query, keys, values in blocks:
        offset = first - (start - before)
        outputs.append(attend(query, keys, values, mask[: query.shape[2], offset : offset + keys.shape[2]]))
    return torch.cat(outputs, dim=2)


def _rounded_up(number: int) -> int:
    return -(-number // _ALIGNMENT) * _ALIGNMENT


class _Spans(torch.autograd.Function):
    """Overlapping spans of tokens of (B, H, L, d), as views.

    Its backward adds all of them into one gradient: PyTorch's would make one of L tokens for every span, which is L^2
    over the size of a block in memory traffic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        ctx.spans, ctx.shape = spans, x.shape
        return tuple(x[:, :, first:last] for first, last in spans)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].new_zeros(ctx.shape)
        for (first, last), part in zip(ctx.spans, grad_outputs, strict=True):
            grad[:, :, first:last] += part
        return grad, None
