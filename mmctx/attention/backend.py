"""What a backend of packed attention is, and what the fused kernels among them share.

Shapes: T tokens, N documents, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mmctx.layout import DocumentLayout

AttentionFunction = Callable[[Tensor, Tensor, Tensor, DocumentLayout, int | None], Tensor]
"""`(q (T, Hq, d), k (T, Hk, d), v (T, Hk, d), layout, window) -> (T, Hq, d)`; the inputs have been checked."""


@dataclass(frozen=True, slots=True)
class Request:
    """What decides whether a backend can serve a call; hashable, so that decisions are made once.

    Attributes:
        device: where q, k and v live.
        dtype: their type.
        head_dim: d.
        windowed: whether a sliding window is asked for.
        deterministic: whether the backward pass must give the same bits each time (`torch.use_deterministic_algorithms`).
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    windowed: bool = False
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of packed attention.

    Attributes:
        name: what users write as `backend=`.
        function: does the work; where PyTorch's deterministic mode is on, with a deterministic backward pass.
        why_not: why it cannot serve a request, with the remedy, or None where it can.
        note: one line on what it is good for.
    """

    name: str
    function: AttentionFunction
    why_not: Callable[[Request], str | None]
    note: str


@lru_cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device: the one place that asks what a GPU can do."""
    return torch.cuda.get_device_capability(device)


def why_no_fused_kernel(request: Request, majors: tuple[int, ...]) -> str | None:
    """The limits that all FlashAttention-like kernels share, made for GPUs of a compute capability among `majors`."""
    if request.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {request.device.type!r}"
    if torch.version.hip is not None:
        return "it is not certified on ROCm; use 'sdpa'"
    major, minor = compute_capability(request.device)
    if major not in majors:
        wanted = ", ".join(f"{m}.x" for m in majors)
        return f"it needs compute capability {wanted}, this GPU has {major}.{minor}"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, the tensors are {request.dtype}; run under autocast or use 'sdpa'"
    if request.head_dim % 8 or request.head_dim > 256:
        return f"it needs a head dimension that is a multiple of 8 up to 256, found {request.head_dim}"
    return None


VarlenCall = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
"""`(q, k, v, cu_seqlens (N+1,) int32, max_seqlen, causal) -> (T, Hq, d)`: one call of a variable-length kernel."""


def causal_then_bidirectional(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, call: VarlenCall) -> Tensor:
    """Serves a layout with one `call` for its causal documents and one for the rest; both are contiguous slices."""
    if layout.num_causal == len(layout.lengths):
        return call(q, k, v, layout.cu_seqlens, layout.max_seqlen, True)
    if layout.num_causal == 0:
        return call(q, k, v, layout.cu_seqlens, layout.max_seqlen, False)
    num_causal, boundary = layout.num_causal, layout.num_causal_tokens
    if "bidirectional_cu_seqlens" not in layout.cache:
        # The boundary is known on the host, so the device is not asked for it.
        layout.cache["bidirectional_cu_seqlens"] = layout.cu_seqlens[num_causal:] - boundary
    # split, not two slices: the backward of each slice would fill a gradient of all T tokens.
    (q1, q2), (k1, k2), (v1, v2) = (x.split((boundary, len(x) - boundary)) for x in (q, k, v))
    causal = call(q1, k1, v1, layout.cu_seqlens[: num_causal + 1], max(layout.lengths[:num_causal]), True)
    cu_seqlens = layout.cache["bidirectional_cu_seqlens"]
    bidirectional = call(q2, k2, v2, cu_seqlens, max(layout.lengths[num_causal:]), False)
    return torch.cat((causal, bidirectional))
