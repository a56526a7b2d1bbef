"""The model half of similarity: embeddings of views, compared with those of every other sample of the global step.

However the step is split into micro-batches and ranks, every view meets all candidates: losses and gradients are those of the union batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctx.objectives.base import ComparingHalf
from mmctx.objectives.contrast import Partners, info_nce, pairwise_sigmoid
from mmctx.objectives.pooling import pool_states
from mmctx.objectives.roster import Roster
from mmctx.objectives.similarity import SimilarityConfig
from mmctx.pack import PackedBatch
from mmctx.sample import source_numbers

PREDICTIONS = {"softmax": 2, "sigmoid": 1}
"""What a pair of partners counts for: a softmax each way, or one decision. A mean of them is open_clip's loss."""


class SimilarityLoss(ComparingHalf):
    """Projection, learned scale and bias; softmax or sigmoid over the pairs of views."""

    def __init__(self, name: str, config: SimilarityConfig, width: int) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.projection = nn.Linear(width, config.dim or width, bias=False)
        # shape (1,): scalars of no dimension break FSDP2
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / config.initial_temperature)))
        self.logit_bias = nn.Parameter(torch.full((1,), config.initial_bias)) if config.loss == "sigmoid" else None

    def embed(self, hidden: Tensor, positions: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """Unit embeddings (N, E) of the pooled positions (P,), so many of them for each; in float32 at least."""
        projected = self.projection(pool_states(hidden, positions, sizes))
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=-1)

    def embed_batch(self, hidden: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        """See `ComparingHalf`: embeddings, `scale` (1,) and, with a sigmoid, `bias` (1,)."""
        views = {
            name: self.embed(hidden, positions, batch.pool_sizes[name])
            for name, positions in batch.pooled.items()
            if name.startswith(f"{self.name}/")
        }
        scale = self.logit_scale.clamp(max=math.log(self.config.max_scale)).exp()
        # every rank needs a gradient for every parameter, also one that embeds nothing
        shared = {"scale": scale + sum((part * 0).sum() for part in (hidden[:1], self.projection.weight))}
        if self.logit_bias is not None:
            shared["bias"] = self.logit_bias * 1
        return views | shared

    def compare(self, embedded: Mapping[str, Tensor], roster: Roster) -> Tensor:
        """See `ComparingHalf`."""
        scale, bias = embedded["scale"], embedded.get("bias")
        total = scale.sum() * 0 if bias is None else (scale + bias).sum() * 0
        for match in self.matches(roster):
            rows, columns, partners = match.on(roster.rank, total.device)
            # a rank without a row still takes part in the exchange, forwards and backwards
            nothing = scale.new_zeros(0, self.projection.out_features) + scale
            a = embedded.get(match.a.view, nothing).index_select(0, rows)  # (A, E)
            b = embedded.get(match.b.view, nothing).index_select(0, columns)
            b = roster.gather(b, match.b.counts)  # (B, E)
            if bias is None:
                total = total + info_nce(a, b, scale, partners, roster.group)
            else:
                total = total + pairwise_sigmoid(a, b, scale, bias, partners)
        return total

    def count_all(self, roster: Roster) -> int:
        """Two softmaxes for every pair of partners, or one decision."""
        return PREDICTIONS[self.config.loss] * sum(match.num_pairs for match in self.matches(roster))

    def count_negatives(self, roster: Roster) -> int:
        """Candidates besides the partner, summed over the softmaxes, or over the rows of a sigmoid that have a partner."""
        by_row = sum(match.num_negatives(by_column=False) for match in self.matches(roster))
        return by_row + sum(m.num_negatives(by_column=True) for m in self.matches(roster) if self.logit_bias is None)

    def matches(self, roster: Roster) -> Iterator[Match]:
        """The pairs of views in which some sample has both."""
        for a, b in self.config.pairs:
            left, right = (Candidates.of(f"{self.name}/{view}", roster) for view in (a, b))
            match = Match.of(left, right, by_source=self.config.negatives == "source")
            if match.num_pairs:
                yield match


@dataclass(frozen=True, slots=True)
class Candidates:
    """The embeddings of one view that are compared: one for each sample, the first of the global step, whoever computes it. A sample drawn
    twice must not be its own negative.

    Attributes:
        view: `OBJECTIVE/VIEW`.
        samples: (n,) int64 of all ranks, in the order of the roster.
        counts: how many of them each rank has.
        rows: by rank, which of its embeddings they are.
    """

    view: str
    samples: np.ndarray
    counts: tuple[int, ...]
    rows: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, view: str, roster: Roster) -> Candidates:
        """The candidates of a view."""
        by_rank = roster.samples(view)
        everyone = np.concatenate(by_rank)
        order = np.argsort(roster.in_order(view))
        first = np.zeros(len(everyone), bool)
        first[order[np.unique(everyone[order], return_index=True)[1]]] = True
        own = np.split(first, np.cumsum([len(samples) for samples in by_rank])[:-1])
        rows = tuple(np.flatnonzero(kept) for kept in own)
        return cls(view, everyone[first], tuple(len(r) for r in rows), rows)


@dataclass(frozen=True, slots=True)
class Match:
    """Two views of a global step: who is compared with whom, and who belongs together. On the host.

    Attributes:
        a, b: rows and columns of the matrix of scores.
        partner: (A of all ranks,) int64 column of the same sample, -1 where there is none.
        by_source: compare samples of one source only.
    """

    a: Candidates
    b: Candidates
    partner: np.ndarray
    by_source: bool

    @classmethod
    def of(cls, a: Candidates, b: Candidates, by_source: bool) -> Match:
        """Pairs up two views by the sample that each embedding belongs to."""
        partner = np.full(len(a.samples), -1)
        rows, columns = matching_rows(a.samples, b.samples)
        partner[rows] = columns
        return cls(a, b, partner, by_source)

    @property
    def num_pairs(self) -> int:
        """Rows that have a partner."""
        return int((self.partner >= 0).sum())

    def num_negatives(self, by_column: bool) -> int:
        """Candidates that are no partners, summed over the rows (or columns) that have one."""
        candidates = self.a if by_column else self.b
        paired = self.a.samples[self.partner >= 0]
        if not self.by_source:
            return len(paired) * (len(candidates.samples) - 1)
        sizes = np.bincount(
            source_numbers(candidates.samples), minlength=int(source_numbers(paired).max(initial=0)) + 1
        )
        return int((sizes[source_numbers(paired)] - 1).sum())

    def on(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Partners]:
        """A rank's embeddings of either view that are compared, and the partners of the former among the columns of all ranks."""
        start = sum(self.a.counts[:rank])
        partner = self.partner[start : start + self.a.counts[rank]]
        is_partner = np.zeros(len(self.b.samples), bool)
        is_partner[self.partner[self.partner >= 0]] = True
        kinds = None
        if self.by_source:
            own = self.a.samples[start : start + len(partner)]
            kinds = _to(source_numbers(own), device), _to(source_numbers(self.b.samples), device)
        partners = Partners(
            _to(np.maximum(partner, 0), device), _to(partner >= 0, device), _to(is_partner, device), kinds
        )
        return _to(self.a.rows[rank], device), _to(self.b.rows[rank], device), partners


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def matching_rows(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers in `a` and in `b` of the samples that stand in both, place by place; each sample's first row."""
    _, in_a, in_b = np.intersect1d(a, b, return_indices=True)
    return in_a, in_b
