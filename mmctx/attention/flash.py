"""Packed attention by the packages `flash-attn` (FlashAttention-2) and `flash-attn-4`, each by its own signature.

Both fill the `flash_attn` namespace, so what is installed is asked of the package metadata; nothing is imported before
a GPU that could run it is at hand.

Shapes: T tokens, N documents, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from mmctx.attention.backend import (
    Backend,
    Request,
    causal_then_bidirectional,
    compute_capability,
    why_no_fused_kernel,
)
from mmctx.layout import DocumentLayout


@lru_cache
def _kernel(module: str) -> Callable[..., Any]:
    return importlib.import_module(module).flash_attn_varlen_func


@lru_cache
def _why_no_package(package: str, module: str, install: str) -> str | None:
    """Why the kernel in `module` of `package` cannot be had, or None."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return f"the package {package} is not installed; {install}"
    try:
        _kernel(module)
    except Exception as error:  # a build for another PyTorch or CUDA fails in many ways
        return f"{package} {installed} does not import ({type(error).__name__}: {error}); {install}"
    return None


def _why_not_deterministic(request: Request, package: str, module: str) -> str | None:
    """Why an installed kernel cannot be asked for a deterministic backward pass where the request wants one."""
    if request.deterministic and "deterministic" not in inspect.signature(_kernel(module)).parameters:
        return f"{package} {version(package)} has no deterministic backward pass; install a newer one"
    return None


def _options() -> dict[str, bool]:
    """Said only when wanted: the oldest versions do not know the word."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


def flash2_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) -> (T, Hq, d), by FlashAttention-2."""
    kernel = _kernel("flash_attn")
    reach = -1 if window is None else window - 1  # keys beside the query's own; -1 is without limit

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
        return kernel(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=causal,
            window_size=(reach, 0 if causal else reach),
            **_options(),
        )

    return causal_then_bidirectional(q, k, v, layout, call)


def flash4_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) -> (T, Hq, d), by FlashAttention-4, which compiles at its first call."""
    kernel = _kernel("flash_attn.cute")
    reach = None if window is None else window - 1  # keys beside the query's own; None is without limit

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
        result = kernel(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=causal,
            window_size=(reach, 0 if causal else reach),
            **_options(),
        )
        # The 4.0 betas return (out, lse) whether or not lse was asked for.
        return result[0] if isinstance(result, tuple) else result

    return causal_then_bidirectional(q, k, v, layout, call)


def _why_not_flash2(request: Request) -> str | None:
    return (
        why_no_fused_kernel(request, majors=(8, 9))
        or _why_no_package("flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation")
        or _why_not_deterministic(request, "flash-attn", "flash_attn")
    )


def _why_not_flash4(request: Request) -> str | None:
    reason = why_no_fused_kernel(request, majors=(9, 10, 11))  # on 8.x it has no backward, on 12.x no deterministic one
    if reason is not None:
        return reason
    if compute_capability(request.device)[0] > 9 and request.head_dim > 128 and request.head_dim != 256:
        return f"on Blackwell it needs a head dimension up to 128, or 256; found {request.head_dim}"
    return _why_no_package("flash-attn-4", "flash_attn.cute", "pip install 'mmctx[flash]'") or _why_not_deterministic(
        request, "flash-attn-4", "flash_attn.cute"
    )


FLASH2 = Backend(
    name="flash2",
    function=flash2_attention,
    why_not=_why_not_flash2,
    note="flash-attn 2.x, a source build; Ampere to Hopper",
)
FLASH4 = Backend(
    name="flash4",
    function=flash4_attention,
    why_not=_why_not_flash4,
    note="flash-attn-4, a pure Python wheel that compiles at its first call; Hopper and Blackwell",
)
