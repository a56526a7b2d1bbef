"""Packed attention by PyTorch's FlexAttention: one Triton kernel compiled for mmctx's mask, on any recent GPU.

It serves what the FlashAttention packages do not: GPUs they know nothing of, float32, odd head dimensions. One compiled
kernel serves all layouts of a window size: lengths and documents reach it as tensors, and shapes are dynamic.

The blocks of the mask that can be skipped are found from the documents at each block's edges, 1/128 of the tokens, so no
(T, T) mask is ever made.

Shapes: T tokens, N documents, M blocks of 128 tokens, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mmctx.attention.backend import Backend, Request
from mmctx.layout import DocumentLayout

BLOCK = 128

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(batch, head, query, key)` indices -> bool: whether the query may attend to the key."""


@dataclass(frozen=True, slots=True)
class _Documents:
    """Of each token, on the device: (T,) number of its document, (T,) whether that attends in both directions."""

    number: Tensor
    bidirectional: Tensor


def flex_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) -> (T, Hq, d)."""
    return flex_with(_compiled(), q, k, v, layout, window)


def flex_with(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None
) -> Tensor:
    """The same by any function of the signature of `torch.nn.attention.flex_attention.flex_attention`."""
    key = ("flex", window)
    if key not in layout.cache:
        layout.cache[key] = make_block_mask(layout, window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T, d)
    # TRITON: PyTorch calls its backward pass deterministic, and nothing else needs to be installed.
    options = {"BACKEND": "TRITON"}
    grouped = q.shape[1] != k.shape[1]
    out = kernel(q, k, v, block_mask=layout.cache[key], enable_gqa=grouped, kernel_options=options)
    return out[0].transpose(0, 1)


@lru_cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Dynamic from the first call: T and the documents change in every step.
    return torch.compile(flex_attention, dynamic=True)


def make_block_mask(layout: DocumentLayout, window: int | None) -> Any:
    """The `BlockMask` of a layout, made on its device without waiting for it."""
    from torch.nn.attention.flex_attention import BlockMask

    documents = _documents(layout)
    partial, full = block_visibility(layout, documents, window)
    (partial_count, partial_order), (full_count, full_order) = _ordered(partial), _ordered(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_order,
        full_count,
        full_order,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(documents, window),
        seq_lengths=(layout.num_tokens, layout.num_tokens),
    )


def _documents(layout: DocumentLayout) -> _Documents:
    token = torch.arange(layout.num_tokens, device=layout.cu_seqlens.device, dtype=torch.int32)
    number = torch.bucketize(token, layout.cu_seqlens[1:], right=True)
    return _Documents(number=number, bidirectional=token >= layout.num_causal_tokens)


def mask_function(documents: _Documents, window: int | None) -> MaskFunction:
    """What one query sees. Packed documents are contiguous, so distances in the pack are distances in the document."""
    number, bidirectional = documents.number, documents.bidirectional

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (number[query] == number[key]) & ((query >= key) | bidirectional[query])
        return seen if window is None else seen & ((query - key).abs() < window)

    return sees


def block_visibility(layout: DocumentLayout, documents: _Documents, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries sees in part, and which wholly: two (M, M) bool tensors, disjoint.

    A block that is called partial for nothing costs time, one that is left out would be wrong: where the edges of the
    blocks do not decide, it is partial.
    """
    total = layout.num_tokens
    first = torch.arange(0, total, BLOCK, device=documents.number.device)  # (M,) first token of each block
    last = (first + BLOCK - 1).clamp(max=total - 1)
    low, high = documents.number[first], documents.number[last]  # (M,) documents at its edges
    share_one = (low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])
    seen = share_one & ((first[None, :] <= last[:, None]) | documents.bidirectional[last][:, None])
    whole = (low == high)[:, None] & (high[:, None] == low[None, :]) & (low == high)[None, :]
    whole &= (last[None, :] <= first[:, None]) | documents.bidirectional[first][:, None]
    if window is not None:
        nearest = torch.maximum(first[:, None] - last[None, :], first[None, :] - last[:, None])
        farthest = torch.maximum(last[:, None] - first[None, :], last[None, :] - first[:, None])
        seen &= nearest < window
        whole &= farthest < window
    whole &= (last - first == BLOCK - 1)[None, :]  # what lies beyond the last token is for the mask to hide
    return seen & ~whole, whole


def _ordered(visible: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, M) number of visible blocks in each row, and (1, 1, M, M) their columns before all others, both int32."""
    columns = torch.argsort(visible.int(), dim=-1, descending=True, stable=True)
    return visible.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def _why_not(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"FlexAttention has no backward pass on {request.device.type!r}, it needs a CUDA device"
    if find_spec("triton") is None:
        return "it needs Triton, which comes with PyTorch's CUDA builds on Linux"
    if request.dtype == torch.float64:
        return "its kernel takes no float64; use 'sdpa'"
    return None


FLEX = Backend(
    name="flex",
    function=flex_attention,
    why_not=_why_not,
    note="PyTorch's FlexAttention; compiles once for each window size, not for each layout",
)
