"""Rows that change ranks: an all-to-all whose gradient takes the way back, and what batches say about it.

A loss that is the sum of the ranks' losses needs no more than that: the gradient of a row goes to the rank that sent it, and a row that was
sent to several ranks gets the sum, because it was laid out once for each of them before it was sent.

Shapes: S ranks of the group, T tokens, D width, n rows sent, m rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowExchange:
    """One all-to-all over rows. Every rank of the group must call it, those with nothing to send or receive too.

    Sizes are host integers that each rank works out for itself, so that nobody waits for a device.

    Attributes:
        send: rows for each of the S ranks; they lie in this order.
        receive: rows from each of the S ranks; they arrive in this order.
        group: the S ranks; None for all there are, or for none where tensors are on the meta device.
    """

    send: tuple[int, ...]
    receive: tuple[int, ...]
    group: dist.ProcessGroup | None

    def __call__(self, rows: Tensor) -> Tensor:
        """(n, ...) -> (m, ...), n = sum(send), m = sum(receive)."""
        return _AllToAll.apply(rows, self)  # type: ignore[no-any-return]

    def back(self) -> RowExchange:
        """The exchange that returns every row to where it came from."""
        return RowExchange(self.receive, self.send, self.group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return _all_to_all(rows, exchange)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad_outputs[0], ctx.exchange.back()), None


def _all_to_all(rows: Tensor, exchange: RowExchange) -> Tensor:
    out = rows.new_empty(sum(exchange.receive), *rows.shape[1:])
    if rows.is_meta:
        return out  # the shape alone is wanted
    dist.all_to_all_single(out, rows.contiguous(), list(exchange.receive), list(exchange.send), group=exchange.group)
    return out


@dataclass(frozen=True, slots=True)
class TokenShards:
    """How the flat sequence is cut over the ranks of a group: each has a contiguous run of tokens, in the order of ranks.

    Attributes:
        sizes: tokens of each of the S ranks, T in all; some may have none.
        rank: the one that this process is.
        group: as in `RowExchange`.
    """

    sizes: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None

    @property
    def own_size(self) -> int:
        """Tokens of this rank."""
        return self.sizes[self.rank]


@dataclass(frozen=True, slots=True)
class LentRows:
    """Hidden states that one rank reads although others computed them: those that embed documents, which are compared with each other.

    Attributes:
        positions: (n,) int64 local positions of the rows to send.
        exchange: who sends how many to whom.
    """

    positions: Tensor
    exchange: RowExchange

    def append(self, hidden: Tensor) -> Tensor:
        """(t, D) of this rank's tokens -> (t + m, D), with the m rows that others lent behind them."""
        return torch.cat([hidden, self.exchange(hidden.index_select(0, self.positions))])
