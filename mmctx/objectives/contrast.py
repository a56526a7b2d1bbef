"""Losses over all pairs of two sets of embeddings, whose matrix of scores is never whole: InfoNCE and the pairwise sigmoid.

A tile of rows of the scores is formed, turned into its share of loss and gradients, and forgotten, as `linear_cross_entropy` does with
logits: memory grows with the number of embeddings, not with its square. Rows may lie on several ranks, each of which has all columns.

Shapes: A rows of this rank, B columns, E channels, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores held at a time, by device. CPU: 4 MiB in fp32, which a cache holds."""


@dataclass(frozen=True, slots=True)
class Partners:
    """Who belongs together, and who is compared.

    Attributes:
        columns: (A,) int64 the partner of each row; any column where it has none. No column is the partner of two rows, on any ranks.
        has_partner: (A,) bool.
        is_partner: (B,) bool, whether the column is the partner of a row, on any rank.
        kinds: (A,) and (B,) int64; rows and columns of different kinds are not compared. None where all are.
    """

    columns: Tensor
    has_partner: Tensor
    is_partner: Tensor
    kinds: tuple[Tensor, Tensor] | None = None


def info_nce(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    partners: Partners,
    group: dist.ProcessGroup | None = None,
    tile: int | None = None,
) -> Tensor:
    """This rank's share of the symmetric softmax loss (InfoNCE, van den Oord et al. 2018; CLIP, Radford et al. 2021), summed.

    With scores s = scale * a @ b.T of all ranks' rows: `sum over pairs (i, j) of logsumexp(s[i, :]) + logsumexp(s[:, j]) - 2 s[i, j]`.
    Gradients are those of the sum over all ranks, formed in the forward pass; the backward pass hands them out, once.

    Args:
        a: (A, E) unit rows of this rank.
        b: (B, E) unit rows, the same on all ranks. The gradient of each rank is its share.
        scale: (1,).
        partners: of this rank's rows.
        group: the ranks that hold other rows.
        tile: R; by default as many as keep `TILE_ELEMENTS` scores.

    Returns:
        A scalar of a's type.
    """
    return _InfoNCE.apply(a, b, scale, partners, group, tile or _tile(b))  # type: ignore[no-any-return]


def pairwise_sigmoid(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, partners: Partners, tile: int | None = None
) -> Tensor:
    """This rank's share of the sigmoid loss (SigLIP, Zhai et al. 2023), summed: each score is a yes or no of its own.

    With s = scale * a @ b.T + bias: `-sum over (i, j) of log sigmoid(z s[i, j])`, z = 1 for partners and -1 for others.

    Args and return value: as in `info_nce`; bias (1,).
    """
    return _PairwiseSigmoid.apply(a, b, scale, bias, partners, tile or _tile(b))  # type: ignore[no-any-return]


def _tile(b: Tensor) -> int:
    return max(1, TILE_ELEMENTS.get(b.device.type, 1 << 20) // max(len(b), 1))


def _in_own_precision(a: Tensor) -> AbstractContextManager[Any]:
    """No autocast: products of bf16 would lose the differences between large scores."""
    return nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False)


class _Tiles:
    """The scores of one loss, tile by tile, and the gradients that they leave."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, partners: Partners, tile: int) -> None:
        self.a, self.b, self.scale, self.partners, self.tile = a, b, scale, partners, tile
        self._buffer = a.new_empty(min(tile, len(a)), len(b))
        self.masked = torch.finfo(a.dtype).min / 4  # not -inf: a row of nothing else would become nan
        self.grad_a, self.grad_b = torch.zeros_like(a), torch.zeros_like(b)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of each tile its rows, scores (R, B) in a buffer that the next one uses again, and partners (R, 1) with their weight, 1 or 0."""
        for start in range(0, len(self.a), self.tile):
            rows = slice(start, min(start + self.tile, len(self.a)))
            scores = torch.mm(self.a[rows] * self.scale, self.b.T, out=self._buffer[: rows.stop - start])
            if self.partners.kinds is not None:
                row_kinds, column_kinds = self.partners.kinds
                scores.masked_fill_(row_kinds[rows, None] != column_kinds, self.masked)
            columns, weight = self.partners.columns[rows, None], self.partners.has_partner[rows, None]
            yield rows, scores, columns, weight.to(scores.dtype)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Takes in the gradient (R, B) of a tile's scores."""
        torch.mm(gradient, self.b, out=self.grad_a[rows])
        self.grad_b.addmm_(gradient.T, self.a[rows])

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a, b and the scale; the last is the sum of gradient times cosine, and so of what a row of a got times that row."""
        of_scale = (self.grad_a * self.a).sum().reshape(1)
        return self.grad_a.mul_(self.scale), self.grad_b.mul_(self.scale), of_scale


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, partners: Partners, group: dist.ProcessGroup | None, tile: int
    ) -> Tensor:
        with _in_own_precision(a):
            tiles = _Tiles(a, b, scale, partners, tile)
            by_row, loss = a.new_empty(len(a)), a.new_zeros(())
            largest, total = b.new_full((len(b),), tiles.masked), b.new_zeros(len(b))  # of each column, so far
            for rows, scores, columns, weight in tiles:
                loss -= 2 * (scores.gather(1, columns) * weight).sum()
                torch.logsumexp(scores, dim=1, out=by_row[rows])
                before, largest = largest, torch.maximum(largest, scores.amax(dim=0))
                total = total * (before - largest).exp() + scores.sub_(largest).exp_().sum(dim=0)
            by_column = _over_ranks(largest, total, group)
            loss += ((by_row + by_column[partners.columns]) * partners.has_partner).sum()
            if any(ctx.needs_input_grad[:3]):
                # without a partner there is no softmax: exp(score - infinity) is nothing
                by_row = by_row.masked_fill(~partners.has_partner, torch.inf)
                _softmaxes(tiles, by_row, by_column.masked_fill(~partners.is_partner, torch.inf))
                ctx.gradients = tiles.gradients()
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_hand_out(ctx, grad_outputs[0]), None, None, None


def _softmaxes(tiles: _Tiles, by_row: Tensor, by_column: Tensor) -> None:
    """The gradient of InfoNCE: softmax along rows + softmax along columns - 2 at partners."""
    buffer = torch.empty_like(tiles._buffer)
    for rows, scores, columns, weight in tiles:
        down = torch.sub(scores, by_column, out=buffer[: len(scores)]).exp_()
        gradient = scores.sub_(by_row[rows, None]).exp_().add_(down)
        tiles.add(rows, gradient.scatter_add_(1, columns, -2 * weight))


class _PairwiseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, partners: Partners, tile: int) -> Tensor:
        with _in_own_precision(a):
            tiles = _Tiles(a, b, scale, partners, tile)
            loss, of_bias = a.new_zeros(()), a.new_zeros(1)
            for rows, scores, columns, weight in tiles:
                scores += bias
                loss += F.softplus(scores).sum() - (scores.gather(1, columns) * weight).sum()
                gradient = scores.sigmoid_().scatter_add_(1, columns, -weight)
                of_bias += gradient.sum()
                tiles.add(rows, gradient)
            ctx.gradients = (*tiles.gradients(), of_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_hand_out(ctx, grad_outputs[0]), None, None


def _hand_out(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    if ctx.gradients is None:
        raise RuntimeError(
            "the contrastive loss has handed its gradients out: compute it anew for a second backward pass"
        )
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(gradient.mul_(upstream) for gradient in gradients)


def _over_ranks(largest: Tensor, total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B,) log sum exp of columns over the rows of all ranks, from each rank's largest score and its sum relative to that."""
    if group is not None:
        own = largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        total = total * (own - largest).exp()
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return largest + total.log()
