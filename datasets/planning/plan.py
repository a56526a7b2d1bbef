"""Which samples each global step reads: a pure function of (config, index, seed, step), from the index alone.

Positions of an endless stream are drawn from the sources in closed form (`order`), windows of many steps are packed independently
(`packing`, `window`), and each step takes bins of like cost. Nothing depends on the number of ranks or
workers, and any step is found without walking through the steps before it: a run's data state is its step number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mmctx.datasets.config import DataConfig
from mmctx.datasets.planning.order import BlockOrder, Mixture, derive_key
from mmctx.datasets.planning.packing import alike, best_fit, deal, even_fit
from mmctx.datasets.planning.streams import Piece, Streams
from mmctx.datasets.planning.survey import survey
from mmctx.datasets.planning.table import Table, Units
from mmctx.datasets.planning.window import Window, fit_window
from mmctx.errors import DataError


@dataclass(frozen=True, slots=True)
class Bin:
    """One packed batch to be: which samples, of which sources, in which epoch.

    Attributes:
        samples: (source number, sample id, epoch, part) of each; part 0 of a whole sample.
        tokens: their tokens, by the index.
        cost: their estimated FLOPs.
        left_out: (source number, sample id, code of a reason) of samples that were drawn beside them and cannot be used.
        step: the global step that reads it, which schedules of objectives follow; None where none does, as in evaluation.
        lane: where the first sample is a piece of a stream: which lane's, a number below `bins_per_step`.
    """

    samples: tuple[tuple[int, int, int, int], ...]
    tokens: int
    cost: int
    left_out: tuple[tuple[int, int, int], ...] = ()
    step: int | None = None
    lane: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a plan takes over: at step 0 with fresh sources, or where an earlier segment of the run stopped.

    Attributes:
        step: first step of the plan.
        drawn: how many samples were drawn before, of each source, or of all together ("") where sources have no weights.
        carried: (source name, sample id, epoch) of samples that were drawn but not read: they come first. Those of sources that the plan
            lacks wait for a later segment.
    """

    step: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)
    carried: tuple[tuple[str, int, int], ...] = ()


class Plan:
    """`plan.step(n)` gives the bins of global step n.

    Args:
        config: sizes and weights.
        tables: the samples of each source, ordered by name.
        seed: the run's seed.
        start: where an earlier segment stopped.

    Raises:
        DataError: a source has no usable sample, among those that `survey` looks at.
    """

    def __init__(self, config: DataConfig, tables: Mapping[str, Table], seed: int, start: Start | None = None) -> None:
        self.config, self.seed, self.start = config, seed, start or Start()
        self.names = tuple(tables)
        self.tables = tuple(tables.values())
        self.surveys = tuple(survey(table) for table in self.tables)
        for name, found in zip(self.names, self.surveys, strict=True):
            if not len(found.units):
                raise DataError(
                    f"data.sources.{name}: no usable sample in {config.sources[name].shards} ({_counts(found.reasons)}); "
                    "for over_long see data.context_length, the limits of bins and long_documents; for the rest run `mmctx data check`"
                )
        self._packed = np.array([n for n, name in enumerate(self.names) if name not in config.streamed])
        """Numbers of the sources whose samples are packed; those of the others are read along lanes."""
        packed = [self.names[n] for n in self._packed]
        self.is_weighted = any(config.sources[name].weight is not None for name in packed)
        streamed = {n: table for n, (name, table) in enumerate(tables.items()) if name in config.streamed}
        before = {n: self.start.drawn.get(self.names[n], 0) for n in streamed}
        self.streams = Streams(streamed, before, config.bins_per_step, seed) if streamed else None
        sizes = [self.tables[n].num_samples for n in self._packed]
        if self.is_weighted:
            self._starts, self._mixture = None, Mixture(self._weights())
            shares = [Fraction(int(count), Mixture.CYCLE) for count in self._mixture.counts]
        else:  # one order over all sources laid end to end: every sample once an epoch
            self._starts, self._mixture = np.cumsum([0, *sizes[:-1]]), Mixture([1.0])
            shares = [Fraction(size, sum(sizes)) for size in sizes]
            sizes = [sum(sizes)] * bool(packed)
        groups = self._groups = tuple(packed) if self.is_weighted else ("",) * bool(packed)
        self._orders = [  # keyed by name: a source's number changes when others come or go, its order must not
            BlockOrder(size, config.block_size, config.blocks_in_flight, derive_key(seed, "order", name or 0))
            for name, size in zip(groups, sizes, strict=True)
        ]
        self._drawn = [self.start.drawn.get(name, 0) for name in groups]
        self._carried = tuple(sample for sample in self.start.carried if sample[0] in tables)
        window = Window(1, 0)  # where all sources are streamed
        if packed:
            surveys = [self.surveys[n] for n in self._packed]
            window = fit_window(surveys, shares, config.limits, config.bins_per_step, config.window_steps)
        self.window_steps, self.samples_per_window = window.steps, window.samples
        self._window = lru_cache(maxsize=2)(self._pack_window)

    @property
    def num_samples(self) -> int:
        """Samples of all sources, those that cannot be used included."""
        return sum(table.num_samples for table in self.tables)

    @property
    def samples_per_step(self) -> float:
        """Samples that a step draws, on average: a window's, divided by its steps."""
        return self.samples_per_window / self.window_steps

    def step(self, step: int) -> list[Bin]:
        """The bins of one global step: `bins_per_step` of them, or a multiple where a window draws more than usual."""
        window, place = divmod(step - self.start.step, self.window_steps)
        if window < 0:
            raise IndexError(f"step {step} comes before step {self.start.step}, where this segment of the plan begins")
        bins = self._window(window)[place]
        if self.streams is None:
            return bins
        pieces = [self.streams.piece(step - self.start.step, lane) for lane in range(self.config.bins_per_step)]
        own = [_with_piece(bin, piece, lane) for lane, (bin, piece) in enumerate(zip(bins, pieces, strict=False))]
        return own + bins[len(own) :]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream positions of this segment (n,) -> (source numbers, sample ids, epochs)."""
        group, ordinal = self._mixture.draw(positions)
        ids, epoch = np.empty_like(ordinal), np.empty_like(ordinal)
        for number, order in enumerate(self._orders):
            inside = np.flatnonzero(group == number)
            epoch[inside], place = np.divmod(ordinal[inside] + self._drawn[number], order.size)
            ids[inside] = order.ordinal(place, epoch[inside])
        if self._starts is not None:
            group = np.searchsorted(self._starts, ids, side="right") - 1
            ids = ids - self._starts[group]
        return self._packed[group], ids, epoch

    def draws(self, steps: int) -> dict[str, int]:
        """How many samples of each order (see `Start.drawn`) are drawn up to the end of the window that holds the last of `steps` steps,
        earlier segments included.
        """
        positions = max(-(-steps // self.window_steps) * self.samples_per_window - len(self._carried), 0)
        counts = self._mixture.count(positions)
        drawn = {name: before + int(n) for name, before, n in zip(self._groups, self._drawn, counts, strict=False)}
        if self.streams is not None:
            drawn |= {self.names[number]: count for number, count in self.streams.draws(steps).items()}
        return drawn

    def _weights(self) -> list[float]:
        """Shares of samples, up to a factor."""
        weights = [float(self.config.sources[self.names[n]].weight or 0) for n in self._packed]
        if self.config.weight_by == "samples":
            return weights
        surveys = [self.surveys[n] for n in self._packed]
        return [weight / float(found.mean("tokens")) for weight, found in zip(weights, surveys, strict=True)]

    def waiting(self, windows: int) -> tuple[tuple[str, int, int], ...]:
        """Samples of `Start.carried` that the first `windows` windows do not reach, or that are of sources the plan lacks."""
        absent = tuple(sample for sample in self.start.carried if sample[0] not in self.names)
        return self._carried[windows * self.samples_per_window :] + absent

    def drawn_by(self, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source numbers, sample ids, epochs) that a window draws, (n,) each; samples carried over from an earlier segment stand first."""
        first = window * self.samples_per_window
        positions = np.arange(first, first + self.samples_per_window)
        carried = self._carried[first : first + self.samples_per_window]
        fresh = self.draw(positions[len(carried) :] - len(self._carried))
        known = [(self.names.index(name), sample, epoch) for name, sample, epoch in carried]
        earlier = np.array(known, np.int64).reshape(-1, 3).T
        return tuple(np.concatenate(pair) for pair in zip(earlier, fresh, strict=True))  # type: ignore[return-value]

    def _pack_window(self, window: int) -> list[list[Bin]]:
        if not len(self._packed):
            return [[Bin((), 0, 0, step=self.start.step + window)] * self.config.bins_per_step]
        group, ids, epoch = self.drawn_by(window)
        found = measure_all(self.tables, group, ids)
        per_step = self.config.bins_per_step
        places, num_bins = even_fit(
            found.costs, found.sizes, self.config.limits, self.window_steps * per_step, step=per_step
        )
        bins = _make_bins(places, num_bins, group, ids, epoch, found)
        groups = alike(np.array([bin.cost for bin in bins]), per_step)
        shuffled = np.random.default_rng(derive_key(self.seed, "steps", window)).permutation(len(groups))
        steps: list[list[Bin]] = [[] for _ in range(self.window_steps)]
        first = self.start.step + window * self.window_steps
        for place, number in enumerate(shuffled.tolist()):
            local = place % self.window_steps
            steps[local] += [replace(bins[bin], step=first + local) for bin in groups[number]]
        return steps


def share_out(bins: Sequence[Bin], rank: int, world_size: int) -> list[tuple[int, Bin]]:
    """(number within the step, bin) of those that one rank takes: as many for each, and costs as even as may be.

    Lanes of streams have their ranks: each takes as many lanes, next to each other, at every step.
    """
    if lanes := sum(bin.lane is not None for bin in bins):
        return [(number, bin) for number, bin in enumerate(bins) if number % lanes * world_size // lanes == rank]
    hands = deal(np.array([bin.cost for bin in bins]), world_size)
    return [(int(number), bins[number]) for number in np.sort(hands[rank])]


def _with_piece(bin: Bin, piece: Piece, lane: int) -> Bin:
    """A bin that reads a piece of a stream before all else."""
    return replace(
        bin,
        samples=(piece.sample, *bin.samples),
        tokens=bin.tokens + piece.tokens,
        cost=bin.cost + piece.cost,
        left_out=(*piece.left_out, *bin.left_out),
        lane=lane,
    )


def measure_all(tables: Sequence[Table], group: np.ndarray, ids: np.ndarray) -> Units:
    """Units of samples of several sources, `owner` counting through all of them."""
    parts = []
    for number, table in enumerate(tables):
        rows = np.flatnonzero(group == number)
        if len(rows):
            parts.append((rows, table.units(ids[rows])))
    reasons = np.zeros(len(ids), np.uint8)
    for rows, units in parts:
        reasons[rows] = units.reasons
    owner = np.concatenate([rows[units.owner] for rows, units in parts])
    order = np.argsort(owner, kind="stable")  # as they were drawn, whatever the order of sources
    joined = [
        np.concatenate([getattr(units, name) for _, units in parts])[order] for name in ("part", "sizes", "costs")
    ]
    return Units(reasons, owner[order], *joined)


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none at all"


def plan_once(tables: Sequence[Table], capacity: int) -> list[Bin]:
    """Every usable sample once, in bins of up to `capacity` tokens: how evaluation reads a set."""
    group = np.concatenate([np.full(table.num_samples, number) for number, table in enumerate(tables)])
    ids = np.concatenate([np.arange(table.num_samples) for table in tables])
    found = measure_all(tables, group, ids)
    places = best_fit(found.sizes[:, 0], capacity)
    num_bins = int(places.max()) + 1 if len(places) else 0
    bins = _make_bins(places, num_bins, group, ids, np.zeros_like(ids), found)
    return [replace(bin, left_out=()) for bin in bins]


def _make_bins(
    places: np.ndarray, num_bins: int, group: np.ndarray, ids: np.ndarray, epoch: np.ndarray, found: Units
) -> list[Bin]:
    """Bins of units, and among them, in turn, the samples that cannot be used: each is written down where it was drawn."""
    unusable = np.flatnonzero(found.reasons)
    left_out = list(
        zip(group[unusable].tolist(), ids[unusable].tolist(), found.reasons[unusable].tolist(), strict=True)
    )
    order = np.argsort(places, kind="stable")
    bounds = np.searchsorted(places[order], np.arange(num_bins + 1))
    owner = found.owner[order]
    columns = (group[owner], ids[owner], epoch[owner], found.part[order])
    samples = list(zip(*(column.tolist() for column in columns), strict=True))
    tokens = np.concatenate([[0], np.cumsum(found.sizes[order, 0])])
    costs = np.concatenate([[0], np.cumsum(found.costs[order])])
    return [
        Bin(
            samples=tuple(samples[start:end]),
            tokens=int(tokens[end] - tokens[start]),
            cost=int(costs[end] - costs[start]),
            left_out=tuple(left_out[number::num_bins]),
        )
        for number, (start, end) in enumerate(pairwise(bounds.tolist()))
    ]
