"""Packed attention: one entry point, one implementation per backend, chosen at run time.

    out = attention(q, k, v, layout)                     # the best backend for these tensors
    out = attention(q, k, v, layout, backend="sdpa")     # this one, or a BackendError that says why not

Importing this module imports no optional kernel package. Under `torch.compile`, call it through
`torch.compiler.disable(attention)`: document lengths are host integers, which tracing would compile anew in every step.

Shapes: T tokens, N documents, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mmctx.attention.backend import Backend, Request
from mmctx.attention.choice import Choice, choice_in_use, current_choice
from mmctx.attention.flash import FLASH2, FLASH4
from mmctx.attention.flex import FLEX
from mmctx.attention.hybrid import HYBRID
from mmctx.attention.sdpa import SDPA
from mmctx.attention.torch_varlen import TORCH_VARLEN
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

__all__ = ["BACKENDS", "Backend", "Request", "attention", "select_backend", "usable_backends"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (FLASH4, TORCH_VARLEN, FLASH2, HYBRID, SDPA, FLEX)}
"""Every backend by name, in the order in which "auto" tries them where no certificate has timed them."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, *, window: int | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention in which no document sees another, with scale d ** -0.5.

    The first `layout.num_causal` documents attend to keys j <= i, the rest in both directions. Hq must be a multiple of
    Hk; query head h reads key head h // (Hq / Hk).

    Args:
        q: (T, Hq, d).
        k: (T, Hk, d).
        v: (T, Hk, d).
        layout: the documents; what a backend derives from them is kept in `layout.cache` for the step's other layers.
        window: w keeps the keys i - w < j <= i of causal documents (the convention of Transformers' `sliding_window`,
            the query's own position included) and |i - j| < w of bidirectional ones; None keeps all.
        backend: a name of `BACKENDS`, or "auto": see `select_backend`.

    Returns:
        (T, Hq, d), of the type of q. Under autocast q, k and v are cast to its type first, as PyTorch's own attention does.

    Raises:
        ValueError: shapes, types or devices do not fit together.
        BackendError: `backend` is unknown or cannot run here.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # on meta, shapes alone are wanted
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    _check(q, k, v, layout, window)
    if not layout.lengths:
        return q  # (0, Hq, d)
    if window is not None and window >= layout.max_seqlen:
        window = None  # no document is long enough to notice
    request = Request(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        windowed=window is not None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return select_backend(backend, request).function(q, k, v, layout, window)


def select_backend(name: str, request: Request) -> Backend:
    """The backend called `name`, or for "auto" the fastest that passed certification here, if there is a certificate.

    Raises:
        BackendError: there is no such backend, or it cannot serve the request; says why and what to do.
    """
    return _select(name, request, choice_in_use())


@lru_cache(maxsize=256)
def _select(name: str, request: Request, in_use: Choice | None) -> Backend:
    """Decided once for each kind of request; `in_use` is here for the cache's key."""
    if name == "auto":
        usable, reasons = usable_backends(request)
        if usable:
            return BACKENDS[usable[0]]
        raise BackendError("no attention backend can run here: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
    if name not in BACKENDS:
        raise BackendError(f"unknown attention backend {name!r}; use 'auto' or one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].why_not(request)
    if reason is not None:
        raise BackendError(
            f"attention backend {name!r} cannot run here: {reason}; backend='auto' takes the best one that can, "
            "`mmctx doctor` lists them"
        )
    return BACKENDS[name]


def usable_backends(request: Request) -> tuple[list[str], dict[str, str]]:
    """What "auto" may take for a request, the best first, and why it may not take the others."""
    choice = current_choice(request.device)
    reasons = {}
    for name, backend in BACKENDS.items():
        reason = choice.why_not(name, request) or backend.why_not(request)
        if reason is not None:
            reasons[name] = reason
    return choice.ordered([name for name in BACKENDS if name not in reasons], request), reasons


def _check(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> None:
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(f"q and k must be (tokens, heads, head_dim), found {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, found {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must agree in tokens and head_dim, found {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the {k.shape[1]} key heads")
    if q.shape[0] != layout.num_tokens:
        raise ValueError(
            f"q has {q.shape[0]} tokens but the layout's {len(layout.lengths)} documents have {layout.num_tokens}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one type, found {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device == layout.cu_seqlens.device:
        raise ValueError(
            f"q, k, v and the layout must be on one device, found {q.device}, {k.device}, {v.device} and "
            f"{layout.cu_seqlens.device}; move the layout with layout.to(device)"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query's own position), found {window}")
