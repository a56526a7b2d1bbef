"""One embedding of several hidden states.

Shapes: T tokens, D width, P pooled positions, E embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pool_states(hidden: Tensor, positions: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """(T, D) hidden states -> (E, D), each the mean over its own positions, in float32 at least where it is one.

    Args:
        hidden: states of all tokens.
        positions: (P,) int64, those of one embedding after those of the other.
        sizes: positions of each of the E embeddings, on the host, P in all; None for one each.
    """
    states = hidden.index_select(0, positions)  # (P, D)
    if sizes is None or all(size == 1 for size in sizes):
        return states
    owner = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(hidden.device, non_blocking=True)
    share = torch.from_numpy(1 / np.repeat(sizes, sizes)).to(hidden.device, non_blocking=True)  # float64, (P,)
    precision = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weighted = states.to(precision) * share.to(precision)[:, None]
    return weighted.new_zeros(len(sizes), hidden.shape[1]).index_add(0, owner, weighted)


__all__ = ["pool_states"]
