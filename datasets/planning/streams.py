"""Long documents along lanes: which piece of which document each lane reads at each step, in closed form.

Every bin of a step has a lane, which reads one document after another, a piece a step, in order. Documents belong to lanes for good,
dealt so that lanes have about as many pieces; each lane goes through its own in another order in each epoch, at its own pace. So a lane's
piece at a step is found from the numbers of pieces alone, without the steps before it, and no number of ranks changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace

import numpy as np

from mmctx.datasets.planning.order import derive_key
from mmctx.datasets.planning.table import Table
from mmctx.errors import DataError


@dataclass(frozen=True, slots=True)
class Piece:
    """What a lane reads at a step.

    Attributes:
        sample: (source number, sample id, epoch, number of the piece).
        tokens, cost: of the piece.
        left_out: (source number, sample id, code of a reason) of samples of the lane that cannot be used, told where its pass begins.
    """

    sample: tuple[int, int, int, int]
    tokens: int
    cost: int
    left_out: tuple[tuple[int, int, int], ...] = ()


class Streams:
    """The lanes of a plan. Looks at every document of its sources once: few enough, as they are long.

    Args:
        tables: of the streamed sources, by their numbers.
        drawn: samples of each that earlier segments of the run have drawn, in whole passes.
        lanes: how many.
        seed: the run's.

    Raises:
        DataError: there are fewer usable documents than lanes.
    """

    def __init__(self, tables: Mapping[int, Table], drawn: Mapping[int, int], lanes: int, seed: int) -> None:
        self._sizes = {number: table.num_samples for number, table in tables.items()}
        self._passes = max(-(-drawn[number] // size) for number, size in self._sizes.items())
        self.seed = seed
        owners, ids, counts, tokens, costs, left_out = [], [], [], [], [], []
        for number, table in tables.items():
            units = table.units(np.arange(table.num_samples))
            usable = np.flatnonzero(units.reasons == 0)
            owners.append(np.full(len(usable), number))
            ids.append(usable)
            counts.append(np.bincount(units.owner, minlength=table.num_samples)[usable])
            tokens.append(units.sizes[:, 0])
            costs.append(units.costs)
            wrong = np.flatnonzero(units.reasons)
            left_out += [(number, int(i), int(units.reasons[i])) for i in wrong]
        self._owners, self._ids, self._counts = (np.concatenate(x) for x in (owners, ids, counts))
        self._tokens, self._costs = np.concatenate(tokens), np.concatenate(costs)  # of all pieces, document by document
        self._first = np.cumsum(self._counts) - self._counts
        if len(self._ids) < lanes:
            raise DataError(
                f"data.bins_per_step={lanes} bins each read a stream of their own, but there are {len(self._ids)} usable documents with "
                "long_documents: stream; lower data.bins_per_step, or add documents"
            )
        self._lanes = _deal(self._counts, lanes)
        self._pieces = [int(self._counts[documents].sum()) for documents in self._lanes]
        self._left_out = [tuple(left_out[lane::lanes]) for lane in range(lanes)]
        self._order = lru_cache(maxsize=4 * lanes)(self._shuffled)

    def piece(self, step: int, lane: int) -> Piece:
        """What a lane reads at a step, counted from where the segment of the plan begins."""
        epoch, place = divmod(step, self._pieces[lane])
        documents, ends = self._order(lane, epoch)
        at = int(np.searchsorted(ends, place, side="right"))
        document = int(documents[at])
        number = place - int(ends[at] - self._counts[document])
        row = int(self._first[document]) + number
        return Piece(
            sample=(int(self._owners[document]), int(self._ids[document]), epoch + self._passes, number),
            tokens=int(self._tokens[row]),
            cost=int(self._costs[row]),
            left_out=self._left_out[lane] if place == 0 else (),
        )

    def draws(self, steps: int) -> dict[int, int]:
        """Samples drawn of each source by `steps` steps and before, in passes that some lane has begun."""
        passes = self._passes + max((-(-steps // pieces) for pieces in self._pieces), default=0)
        return {number: passes * size for number, size in self._sizes.items()}

    def _shuffled(self, lane: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """A lane's documents in the order of an epoch, and after how many pieces each ends."""
        rng = np.random.default_rng(derive_key(self.seed, "stream", lane, epoch + self._passes))
        documents = rng.permutation(self._lanes[lane])
        return documents, np.cumsum(self._counts[documents])


def _deal(counts: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Documents of each lane: the longest first, each to the lane that has the fewest pieces (LPT, Graham 1969)."""
    hands: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0, lane) for lane in range(lanes)]
    heapify(heap)
    for document in np.argsort(-counts, kind="stable").tolist():
        held, lane = heap[0]
        hands[lane].append(document)
        heapreplace(heap, (held + int(counts[document]), lane))
    return [np.array(hand, np.int64) for hand in hands]
