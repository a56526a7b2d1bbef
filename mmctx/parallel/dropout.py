"""Dropout that does not depend on how the tokens lie on ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmctx.parallel.exchange import TokenShards


def shard_dropout(x: Tensor, rate: float, training: bool, shards: TokenShards | None) -> Tensor:
    """Dropout of this rank's tokens: (t, D) -> (t, D), as one process would drop them, where all ranks seeded their generators alike.

    Every rank draws the mask of all T tokens and keeps its part: generators cannot be asked for the middle of a sequence. That takes T x D
    numbers for a moment, which only runs with dropout pay.
    """
    if shards is None or not training or rate == 0:
        return F.dropout(x, rate, training)
    start = sum(shards.sizes[: shards.rank])
    everyone = F.dropout(x.new_ones(sum(shards.sizes), *x.shape[1:]), rate)  # (T, D), 0 or 1 / (1 - rate)
    return x * everyone[start : start + shards.own_size].clone()  # a view would keep all of it for the backward pass
