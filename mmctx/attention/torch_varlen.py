"""Packed attention by the variable-length kernels inside PyTorch 2.10 and newer (`torch.nn.attention.varlen`).

Shapes: T tokens, N documents, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmctx.attention.backend import Backend, Request, causal_then_bidirectional, why_no_fused_kernel
from mmctx.layout import DocumentLayout


@lru_cache
def _parameters() -> frozenset[str]:
    """The parameters of the installed `varlen_attn`, which differ by version; empty where PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) -> (T, Hq, d)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        # Said only where heads really are grouped: with enable_gqa and equal heads, PyTorch 2.14 would run
        # FlashAttention forward but cuDNN backward.
        if "enable_gqa" in _parameters():
            options["enable_gqa"] = True
        else:  # PyTorch 2.10 and 2.11
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
        reach = _span(window, max_seqlen, causal)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **reach, **options)  # pyright: ignore[reportReturnType]  # a tuple only with return_aux

    return causal_then_bidirectional(q, k, v, layout, call)


def _span(window: int | None, max_seqlen: int, causal: bool) -> dict[str, Any]:
    """The keyword that says which keys are in reach of a query."""
    if "window_size" not in _parameters():  # PyTorch 2.10
        return {"is_causal": causal}
    reach = -1 if window is None else window - 1  # keys to the left besides the query's own; -1 is without limit
    if reach == -1 and not causal and torch.are_deterministic_algorithms_enabled():
        # Without any limit PyTorch 2.14 takes cuDNN, of whose backward pass nothing is promised. With one that is never
        # reached it takes FlashAttention, which heeds the deterministic mode.
        reach = max_seqlen
    return {"window_size": (reach, 0 if causal else reach)}


def _why_not(request: Request) -> str | None:
    reason = why_no_fused_kernel(request, majors=(8, 9, 10, 11, 12))
    if reason is None and not _parameters():
        reason = "it needs PyTorch 2.10 or newer, which has torch.nn.attention.varlen"
    if reason is None and request.windowed and "window_size" not in _parameters():
        reason = "windows need PyTorch 2.11 or newer, whose varlen_attn takes window_size"
    return reason


TORCH_VARLEN = Backend(
    name="torch_varlen",
    function=varlen_attention,
    why_not=_why_not,
    note="the FlashAttention-2 and cuDNN kernels inside PyTorch; nothing to install",
)
