"""Packed attention by the variable-length kernels inside PyTorch 2.11 and newer (`torch.nn.attention.varlen`).

Shapes: T tokens, N documents, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

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
        else:  # PyTorch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    reach = -1 if window is None else window - 1  # keys to the left besides the query's own; -1 is without limit

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
        window_size = (reach, 0 if causal else reach)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=window_size, **options)  # pyright: ignore[reportReturnType]  # a tuple only with return_aux

    return causal_then_bidirectional(q, k, v, layout, call)


def _why_not(request: Request) -> str | None:
    reason = why_no_fused_kernel(request, majors=(8, 9, 10, 11, 12))
    if reason is None and "window_size" not in _parameters():
        reason = "it needs PyTorch 2.11 or newer, whose varlen_attn takes window_size"
    return reason


TORCH_VARLEN = Backend(
    name="torch_varlen",
    function=varlen_attention,
    why_not=_why_not,
    note="the FlashAttention-2 and cuDNN kernels inside PyTorch; nothing to install",
)
