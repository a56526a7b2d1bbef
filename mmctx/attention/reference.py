"""Dense attention in float64 with an explicit mask: slow, obvious, and what every backend is certified against.

It shares no code with the backends and reads the documents from their lengths only.

Shapes: T tokens, Hq query heads, Hk key and value heads, G = Hq / Hk, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmctx.layout import DocumentLayout


def attention_mask(layout: DocumentLayout, window: int | None = None) -> Tensor:
    """(T, T) bool: True where the token of the row may attend to the token of the column."""
    document = torch.repeat_interleave(
        torch.arange(len(layout.lengths)), torch.tensor(layout.lengths, dtype=torch.long)
    )
    position = torch.arange(len(document))
    distance = position[:, None] - position[None, :]  # (T, T), positive where the key lies before the query
    mask = document[:, None] == document[None, :]
    mask &= (distance >= 0) | (document >= layout.num_causal)[:, None]
    if window is not None:
        mask &= distance.abs() < window
    return mask


def reference_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None = None) -> Tensor:
    """q (T, Hq, d), k and v (T, Hk, d) of any float type -> (T, Hq, d) float64, differentiable; memory grows as T^2."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (T, Hq, d): query head h reads key head h // G
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5  # (Hq, T, T)
    mask = attention_mask(layout, window).to(q.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, v)
