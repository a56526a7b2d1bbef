"""From an encoder's features to embeddings of the trunk's width.

Shapes: I pictures, h rows and w columns of tokens, C channels, R embeddings, D trunk width, r shuffle factor.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

ProjectorKind = Literal["linear", "mlp"]


def build_projector(kind: ProjectorKind, in_dim: int, dim: int) -> nn.Sequential:
    """The map (R, in_dim) -> (R, D): a layer norm, then one linear layer or two with a GELU between (LLaVA-1.5).

    The norm comes first because towers end differently: timm ViTs pooled by mean leave their tokens unnormalised.

    Args:
        kind: `linear` or `mlp`.
        in_dim: width of the features.
        dim: D, also the hidden width of the `mlp`.
    """
    if kind == "linear":
        return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim))
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim), nn.GELU(), nn.Linear(dim, dim))


def pixel_shuffle(x: Tensor, r: int) -> Tensor:
    """Merges every r x r square of tokens into one token of r * r times the channels (InternVL, Idefics3).

    Args:
        x: (I, h, w, C).
        r: side of the square; 1 changes nothing.

    Returns:
        (I, h/r, w/r, C*r*r); the channels of a token are its square's tokens, row by row.

    Raises:
        ValueError: h or w is not divisible by r.
    """
    num_items, h, w, c = x.shape
    if h % r or w % r:
        raise ValueError(f"pixel shuffle by {r} needs a grid divisible by {r}, found {h} x {w} tokens")
    x = x.view(num_items, h // r, r, w // r, r, c).transpose(2, 3)  # (I, h/r, w/r, r, r, C)
    return x.reshape(num_items, h // r, w // r, r * r * c)
