"""Who embeds what in a global step: what all ranks know of each other's embeddings before one is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor

from mmctx.pack import PackedBatch
from mmctx.parallel.exchange import RowExchange

Entries = Mapping[str, tuple[int, ...]]
"""Of each `OBJECTIVE/VIEW` of a batch, the sample that each of its embeddings belongs to: `PackedBatch.pairs`."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The embeddings of a global step, in the order of ranks, of a rank's micro-batches, and of their places in them. On the host, and the
    same on all ranks.

    Attributes:
        entries: by rank, by micro-batch.
        numbers: by rank, the number that each micro-batch has in the global step, whoever computes it.
        rank: of this process.
        group: the ranks; None for one alone.
    """

    entries: Sequence[Sequence[Entries]]
    numbers: Sequence[Sequence[int]]
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, *batches: PackedBatch) -> Roster:
        """Of one process's batches, which are compared with each other and with no others."""
        return cls([[batch.pairs for batch in batches]], [range(len(batches))])

    def samples(self, view: str) -> list[np.ndarray]:
        """By rank, (P,) int64 samples of its embeddings of an `OBJECTIVE/VIEW`."""
        return [
            np.array([sample for batch in batches for sample in batch.get(view, ())], np.int64)
            for batches in self.entries
        ]

    def in_order(self, view: str) -> np.ndarray:
        """(P of all ranks,) int64: where each embedding of a view would stand if one process computed the step."""
        lengths = [len(batch.get(view, ())) for batches in self.entries for batch in batches]
        numbers = np.repeat([number for rank in self.numbers for number in rank], lengths)
        order = np.argsort(numbers, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return places

    def embeds_in(self, number: int) -> bool:
        """Whether some rank's micro-batch of this number embeds anything."""
        return any(batches[number] for batches in self.entries)

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows of embeddings: (n, E) -> (sum(counts), E), `n = counts[rank]`. Gradients go back to who sent a row, added up.

        Each rank calls it, those without a row, too.
        """
        if self.group is None:
            return rows
        exchange = RowExchange((len(rows),) * len(counts), tuple(counts), self.group)
        return exchange(rows.repeat(len(counts), 1))
