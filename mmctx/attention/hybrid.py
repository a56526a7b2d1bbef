"""Packed attention by two kernels: long documents one by one by the first, the short ones together by the second.

On Hopper PyTorch's dense attention runs cuDNN, on long documents about twice as fast as the variable-length kernels
that PyTorch brings; on short ones a call for each would cost more than its arithmetic. Where one overtakes the other is
measured by `mmctx doctor` and kept in the machine's certificate.

Shapes: T tokens, N documents, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mmctx.attention.backend import AttentionFunction, Backend, Request
from mmctx.attention.choice import Crossover, current_choice
from mmctx.attention.flash import FLASH2, FLASH4
from mmctx.attention.sdpa import SDPA
from mmctx.attention.torch_varlen import TORCH_VARLEN
from mmctx.layout import DocumentLayout

SHORT = {backend.name: backend for backend in (FLASH4, TORCH_VARLEN, FLASH2)}
"""Backends that may serve the short documents."""
LONG = SDPA


@dataclass(frozen=True, slots=True)
class _Parts:
    """How one layout is cut.

    Attributes:
        sizes: tokens of each part, in the packed order; short neighbours make one part.
        is_long: whether a part is one long document.
        layouts: of each long part, in order.
        short: of all short documents together, None where there are none.
    """

    sizes: tuple[int, ...]
    is_long: tuple[bool, ...]
    layouts: tuple[DocumentLayout, ...]
    short: DocumentLayout | None


def make_hybrid(long: AttentionFunction, short: AttentionFunction, crossover: Crossover) -> AttentionFunction:
    """A function that serves documents of at least the crossover's lengths by `long`, the others by `short`.

    Under a window, `long` gets only the documents that the window does not reach across: for the rest, a kernel that
    knows windows has little work left.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
        key = ("hybrid", window, crossover)
        if key not in layout.cache:
            layout.cache[key] = _cut(layout, window, crossover)
        parts: _Parts = layout.cache[key]
        if not parts.layouts:
            return short(q, k, v, layout, window)
        # split and cat, not slices: the backward of every slice would fill a gradient of all T tokens.
        pieces = [x.split(parts.sizes) for x in (q, k, v)]
        outputs: list[Tensor | None] = [None] * len(parts.sizes)
        places = [place for place, is_long in enumerate(parts.is_long) if is_long]
        for place, own in zip(places, parts.layouts, strict=True):
            q_own, k_own, v_own = (piece[place] for piece in pieces)
            outputs[place] = long(q_own, k_own, v_own, own, None)
        if parts.short is not None:
            rest = [place for place, is_long in enumerate(parts.is_long) if not is_long]
            q_rest, k_rest, v_rest = (torch.cat([piece[place] for place in rest]) for piece in pieces)
            out = short(q_rest, k_rest, v_rest, parts.short, window)
            for place, part in zip(rest, out.split([parts.sizes[place] for place in rest]), strict=True):
                outputs[place] = part
        return torch.cat([output for output in outputs if output is not None])

    return attend


def _cut(layout: DocumentLayout, window: int | None, crossover: Crossover) -> _Parts:
    """Sorts the documents into long and short ones; runs on the host, ends in copies of a few numbers to the device."""
    device = layout.cu_seqlens.device
    is_long = [
        crossover.is_long(length, causal=number < layout.num_causal) and (window is None or length <= window)
        for number, length in enumerate(layout.lengths)
    ]
    sizes, kinds, layouts = [], [], []
    for long, run in groupby(range(len(is_long)), key=is_long.__getitem__):
        documents = list(run)
        if not long:
            sizes.append(sum(layout.lengths[document] for document in documents))
            kinds.append(False)
            continue
        for document in documents:
            length = layout.lengths[document]
            sizes.append(length)
            kinds.append(True)
            layouts.append(DocumentLayout.from_lengths((length,), int(document < layout.num_causal), device))
    rest = [document for document, long in enumerate(is_long) if not long]
    short = None
    if rest and layouts:
        num_causal = sum(document < layout.num_causal for document in rest)
        short = DocumentLayout.from_lengths([layout.lengths[document] for document in rest], num_causal, device)
    return _Parts(tuple(sizes), tuple(kinds), tuple(layouts), short)


def hybrid_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) -> (T, Hq, d), by this machine's certificate."""
    crossover = current_choice(q.device).crossover
    assert crossover is not None, "why_not was not asked"
    return make_hybrid(LONG.function, SHORT[crossover.short].function, crossover)(q, k, v, layout, window)


def _why_not(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {request.device.type!r}"
    crossover = current_choice(request.device).crossover
    if crossover is None:
        return "no certificate says from which length on dense attention is faster here; run `mmctx doctor`"
    if crossover.short not in SHORT:
        return f"the certificate names {crossover.short!r} for short documents, which this version does not know"
    reason = SHORT[crossover.short].why_not(request) or LONG.why_not(request)
    return reason and f"its kernel for short documents, {crossover.short}: {reason}"


HYBRID = Backend(
    name="hybrid",
    function=hybrid_attention,
    why_not=_why_not,
    note="long documents by dense attention (cuDNN on Hopper), short ones by a variable-length kernel",
)
