"""Packed attention by PyTorch's own `scaled_dot_product_attention`: any device and float type, the CPU path.

Long documents are attended to one by one. Short ones of near-equal length share a bucket, because a call of its own
would cost a short document more than its arithmetic. All layers of a step share one plan: which tokens stand in which
bucket.

Shapes: T tokens, S slots (T and the padding of the buckets), B documents in a bucket, L the longest of them, H heads,
Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.attention.backend import Backend, Request
from mmctx.attention.windows import attend_in_blocks, band, is_worth_blocks
from mmctx.layout import DocumentLayout

# A shorter document joins a bucket while it keeps padding small ...
_MIN_FILL = 0.8
# ... and while the query-key pairs wasted on it cost less than a call of its own, which is worth about this many pairs.
# CPU: measured, 0.1 ms against 0.04 us a pair (4 heads of 48). Elsewhere: a launch costs as much as far more pairs.
_CALL_IN_PAIRS = {"cpu": 2048}
_CALL_IN_PAIRS_ELSEWHERE = 1 << 18


@dataclass(frozen=True, slots=True)
class _Bucket:
    """B documents side by side, each padded at its end to L tokens.

    Attributes:
        count: B.
        length: L.
        causal: whether they attend causally.
        mask: None, (B, 1, 1, L) or (B or 1, 1, L, L) bool: where attention is allowed, by causality and window too.
        blocked: the window is much shorter than L: skip the work outside it.
    """

    count: int
    length: int
    causal: bool
    mask: Tensor | None
    blocked: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """The buckets of one layout, and how to go from tokens to slots and back.

    Attributes:
        buckets: in the order of their slots.
        token_of_slot: (S,) int64, or None where tokens already stand in the order of the slots, without padding.
        slot_of_token: (T,) int64, or None likewise.
        padding: (S - T,) int64, the slots that hold no token of their own, or None likewise.
    """

    buckets: tuple[_Bucket, ...]
    token_of_slot: Tensor | None = None
    slot_of_token: Tensor | None = None
    padding: Tensor | None = None


class _Gather(torch.autograd.Function):
    """Rows between the order of tokens and the order of slots: (R, C) -> (len(index), C).

    Its backward gathers as well, by the inverse index: PyTorch's would fill a gradient with zeros and add to it row by
    row, twice as slow. `padding` are the rows that the forward left out, whose gradient is zero. Towards slots there are
    none, and the padding added there is left out: its gradient is zero, for no token attends to it and its output goes
    nowhere.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None) -> Tensor:
        ctx.inverse, ctx.padding = inverse, padding
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad_outputs[0].index_select(0, ctx.inverse)
        if ctx.padding is not None:
            grad = grad.index_fill_(0, ctx.padding, 0)
        return grad, None, None, None


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) -> (T, Hq, d)."""
    key = ("sdpa", window)
    if key not in layout.cache:
        layout.cache[key] = _make_plan(layout, window, q.device)
    plan: _Plan = layout.cache[key]
    sizes = [bucket.count * bucket.length for bucket in plan.buckets]
    # split, not slices: the backward of every slice would fill a gradient of all S slots.
    q_parts, k_parts, v_parts = (_to_slots(x, plan).split(sizes) for x in (q, k, v))
    parts = zip(q_parts, k_parts, v_parts, plan.buckets, strict=True)
    outputs = [_attend_bucket(*part, window) for part in parts]
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return _to_tokens(out, plan)


def _to_slots(x: Tensor, plan: _Plan) -> Tensor:
    """(T, H, d) -> (S, H, d). Rows are flattened because CPU gathers rows of two dimensions three times slower."""
    if plan.token_of_slot is None:
        return x
    rows = _Gather.apply(x.flatten(1), plan.token_of_slot, plan.slot_of_token, None)
    return rows.unflatten(1, x.shape[1:])


def _to_tokens(x: Tensor, plan: _Plan) -> Tensor:
    """(S, H, d) -> (T, H, d)."""
    if plan.token_of_slot is None:
        return x
    rows = _Gather.apply(x.flatten(1), plan.slot_of_token, plan.token_of_slot, plan.padding)
    return rows.unflatten(1, x.shape[1:])


def _attend_bucket(q: Tensor, k: Tensor, v: Tensor, bucket: _Bucket, window: int | None) -> Tensor:
    """q (B * L, Hq, d), k and v (B * L, Hk, d) -> (B * L, Hq, d)."""
    q, k, v = (x.unflatten(0, (bucket.count, bucket.length)).transpose(1, 2) for x in (q, k, v))  # (B, H, L, d)
    if bucket.blocked and window is not None:
        out = attend_in_blocks(q, k, v, window, bucket.causal, partial(_sdpa, causal=bucket.causal))
    else:
        out = _sdpa(q, k, v, bucket.mask, bucket.causal)
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.device.type != "cpu":
        # With a mask, no fused CUDA kernel takes grouped heads: PyTorch would fall back to its unfused path.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )


def _make_plan(layout: DocumentLayout, window: int | None, device: torch.device) -> _Plan:
    """Sorts the documents of `layout` into buckets; runs on the host and ends in one copy of each index to `device`."""
    lengths = torch.tensor(layout.lengths)
    starts = lengths.cumsum(0) - lengths
    call_in_pairs = _CALL_IN_PAIRS.get(device.type, _CALL_IN_PAIRS_ELSEWHERE)
    groups = _group(layout.lengths, range(layout.num_causal), call_in_pairs)
    groups += _group(layout.lengths, range(layout.num_causal, len(layout.lengths)), call_in_pairs)
    groups.sort(key=lambda group: group[0])  # the packed order, if it can be kept, needs no gather

    buckets: list[_Bucket] = []
    token_of_slot: list[Tensor] = []
    is_token: list[Tensor] = []
    for group in groups:
        longest = max(layout.lengths[document] for document in group)
        own = lengths[group][:, None]  # (B, 1)
        column = torch.arange(longest)
        # Padding repeats the last token of the same document: a finite document stays finite, and none sees another.
        token_of_slot.append((starts[group][:, None] + torch.minimum(column, own - 1)).flatten())
        is_token.append((column < own).flatten())
        causal, blocked = group[0] < layout.num_causal, window is not None and is_worth_blocks(longest, window)
        mask = None if blocked else _bucket_mask(own, longest, causal, window)
        if mask is not None:
            mask = mask.to(device, non_blocking=True)
        buckets.append(_Bucket(count=len(group), length=longest, causal=causal, mask=mask, blocked=blocked))

    slots, filled = torch.cat(token_of_slot), torch.cat(is_token)
    if torch.equal(slots, torch.arange(layout.num_tokens)):
        return _Plan(buckets=tuple(buckets))
    slot_of_token = torch.empty(layout.num_tokens, dtype=torch.long)
    slot_of_token[slots[filled]] = filled.nonzero().flatten()
    indices = (slots, slot_of_token, (~filled).nonzero().flatten())
    return _Plan(tuple(buckets), *(index.to(device, non_blocking=True) for index in indices))


def _group(lengths: tuple[int, ...], documents: range, call_in_pairs: int) -> list[list[int]]:
    """Cuts `documents`, longest first, into groups worth padding to their longest, each in the packed order."""
    groups: list[list[int]] = []
    longest = 0
    for document in sorted(documents, key=lambda document: -lengths[document]):
        length = lengths[document]
        if not groups or length < _MIN_FILL * longest or longest**2 - length**2 > call_in_pairs:
            groups.append([])
            longest = length
        groups[-1].append(document)
    return [sorted(group) for group in groups]


def _bucket_mask(own: Tensor, longest: int, causal: bool, window: int | None) -> Tensor | None:
    """The mask of documents of `own` (B, 1) lengths padded to `longest`; None where `is_causal` alone says it all."""
    column = torch.arange(longest)
    padded = bool((own < longest).any())
    in_window = None
    if window is not None and window < longest:
        in_window = band(column, column, window, causal)[None, None]  # (1, 1, L, L)
    if causal or not padded:
        return in_window  # a causal query never reaches the padding, which lies after it
    in_document = (column < own)[:, None, None, :]  # (B, 1, 1, L)
    if in_window is None:
        return in_document
    # A query that is padding itself may lie further than the window from every token. It sees padding, so that its row
    # is not empty and no NaN enters the backward; its output goes nowhere.
    return in_window & (in_document | ~in_document.transpose(2, 3))


def _why_not(request: Request) -> str | None:
    if not request.dtype.is_floating_point:
        return f"it needs a float type, the tensors are {request.dtype}"
    return None


SDPA = Backend(
    name="sdpa",
    function=sdpa_attention,
    why_not=_why_not,
    note="PyTorch's scaled_dot_product_attention by document and bucket; any device and float type, the CPU path",
)
