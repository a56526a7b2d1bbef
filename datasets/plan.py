"""Which samples each global step reads: a pure function of (config, index, seed, step), integers only.

Positions of an endless stream are drawn from the sources in closed form (`order`), windows of many steps are packed independently
(`packing`), and the bins of a window are dealt to its steps so that their costs are even. Nothing depends on the number of ranks or
workers, and any step is found without walking through the steps before it: a run's data state is its step number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from mmctx.datasets.config import DataConfig
from mmctx.datasets.order import BlockOrder, Mixture, derive_key
from mmctx.datasets.packing import best_fit, deal, even_fit
from mmctx.errors import DataError

FILL = 0.985
"""Share of `bin_tokens` that bins are filled to on average."""

SLACK = 1.1
"""A window that draws more tokens than usual fills its bins beyond `bin_tokens`, hardly ever by more than this factor. Without padding
that costs nothing."""


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The usable samples of one source, with their sizes.

    Attributes:
        ids: (n,) sample numbers within the source.
        tokens: (n,) tokens of all documents that a sample makes.
        costs: (n,) estimated work, in token units: tokens plus attention's sum of squared document lengths, scaled.
    """

    ids: np.ndarray
    tokens: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True, slots=True)
class Bin:
    """One packed batch to be: which samples, of which sources, in which epoch.

    Attributes:
        samples: (source number, sample id, epoch) of each.
        tokens: their tokens, by the index.
        cost: their estimated work.
    """

    samples: tuple[tuple[int, int, int], ...]
    tokens: int
    cost: float


class Plan:
    """`plan.step(n)` gives the bins of global step n.

    Args:
        config: sizes and weights.
        tables: the usable samples of each source, ordered by name.
        seed: the run's seed.

    Raises:
        DataError: a source has no usable sample.
    """

    def __init__(self, config: DataConfig, tables: Mapping[str, SampleTable], seed: int) -> None:
        self.config, self.seed = config, seed
        self.names = tuple(tables)
        self.tables = tuple(tables.values())
        for name, table in tables.items():
            if not len(table.ids):
                raise DataError(
                    f"data.sources.{name}: no usable sample in {config.sources[name].shards}; run `mmctx data index` to see why"
                )
        sizes = [len(table.ids) for table in self.tables]
        weights = [config.sources[name].weight for name in self.names]
        if weights[0] is None:  # one order over all sources laid end to end: every sample once an epoch
            self._starts, self._mixture, sizes = np.cumsum([0, *sizes[:-1]]), Mixture([1.0]), [sum(sizes)]
        else:
            self._starts, self._mixture = None, Mixture([float(weight or 0) for weight in weights])
        self._orders = [
            BlockOrder(size, config.block_size, config.blocks_in_flight, derive_key(seed, "order", number))
            for number, size in enumerate(sizes)
        ]
        self.bins_per_window = config.window_steps * config.bins_per_step
        self.samples_per_window = self._fit_window()
        self._window = lru_cache(maxsize=2)(self._pack_window)

    @property
    def num_samples(self) -> int:
        """Usable samples of all sources."""
        return sum(len(table.ids) for table in self.tables)

    @property
    def samples_per_step(self) -> float:
        """Samples of a step, on average: a window's, divided by its steps."""
        return self.samples_per_window / self.config.window_steps

    def step(self, step: int) -> list[Bin]:
        """The `bins_per_step` bins of one global step; rank r of w takes every w-th from the r-th on."""
        window, place = divmod(step, self.config.window_steps)
        return self._window(window)[place]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream positions -> (source numbers, rows of its table, epochs)."""
        group, ordinal = self._mixture.draw(positions)
        row, epoch = np.empty_like(ordinal), np.empty_like(ordinal)
        for number, order in enumerate(self._orders):
            inside = np.flatnonzero(group == number)
            epoch[inside], place = np.divmod(ordinal[inside], order.size)
            row[inside] = order.ordinal(place, epoch[inside])
        if self._starts is not None:
            group = np.searchsorted(self._starts, row, side="right") - 1
            row = row - self._starts[group]
        return group, row, epoch

    def _fit_window(self) -> int:
        """Samples a window takes, always the same number, so that step -> samples stays in closed form.

        As many as fill the bins on average, fewer if drawing three standard deviations more tokens would go beyond the slack, or if trial
        windows show that the lengths do not pack that tightly.
        """
        budget = self.bins_per_window * self.config.bin_tokens
        shares = self._mixture.counts if self._starts is None else np.array([len(table.ids) for table in self.tables])
        shares = shares / shares.sum()
        mean = float(sum(s * t.tokens.mean() for s, t in zip(shares, self.tables, strict=True)))
        square = float(sum(s * (t.tokens.astype(float) ** 2).mean() for s, t in zip(shares, self.tables, strict=True)))
        spread = 3 * max(square - mean**2, 0.0) ** 0.5
        # the largest count with mean * count + spread * sqrt(count) <= SLACK * budget
        root = ((spread**2 + 4 * mean * SLACK * budget) ** 0.5 - spread) / (2 * mean)
        least = self.bins_per_window  # one sample a bin always fits
        count = max(int(min(root**2, FILL * budget / mean)), least)
        while count > least and any(self._trial(window, count) > SLACK * self.config.bin_tokens for window in range(3)):
            count = max(least, min(count - 1, int(count * 0.98)))
        return count

    def _trial(self, window: int, count: int) -> int:
        """Tokens that the bins of a window of `count` samples must hold."""
        group, row, _ = self.draw(np.arange(window * count, (window + 1) * count))
        return even_fit(self._gather("tokens", group, row), self.bins_per_window, self.config.bin_tokens)[1]

    def _gather(self, column: str, group: np.ndarray, row: np.ndarray) -> np.ndarray:
        out = np.empty(len(row), dtype=getattr(self.tables[0], column).dtype)
        for number, table in enumerate(self.tables):
            inside = group == number
            out[inside] = getattr(table, column)[row[inside]]
        return out

    def _pack_window(self, window: int) -> list[list[Bin]]:
        count = self.samples_per_window
        group, row, epoch = self.draw(np.arange(window * count, (window + 1) * count))
        tokens, costs, ids = (self._gather(column, group, row) for column in ("tokens", "costs", "ids"))
        places, _ = even_fit(tokens, self.bins_per_window, self.config.bin_tokens)
        bins = _make_bins(places, self.bins_per_window, group, ids, epoch, tokens, costs)
        hands = deal(np.array([b.cost for b in bins]), self.config.window_steps)
        shuffled = np.random.default_rng(derive_key(self.seed, "steps", window)).permutation(len(hands))
        return [[bins[number] for number in hands[place]] for place in shuffled]


def plan_once(tables: Sequence[SampleTable], capacity: int) -> list[Bin]:
    """Every sample once, in bins of up to `capacity` tokens: how evaluation reads a set."""
    group = np.concatenate([np.full(len(table.ids), number) for number, table in enumerate(tables)])
    tokens = np.concatenate([table.tokens for table in tables])
    places = best_fit(tokens, capacity)
    assert places is not None
    ids, costs = (np.concatenate([getattr(table, column) for table in tables]) for column in ("ids", "costs"))
    return _make_bins(
        places, int(places.max()) + 1 if len(places) else 0, group, ids, np.zeros_like(ids), tokens, costs
    )


def _make_bins(
    places: np.ndarray,
    num_bins: int,
    group: np.ndarray,
    ids: np.ndarray,
    epoch: np.ndarray,
    tokens: np.ndarray,
    costs: np.ndarray,
) -> list[Bin]:
    order = np.argsort(places, kind="stable")
    bounds = np.searchsorted(places[order], np.arange(num_bins + 1))
    bins = []
    for start, end in pairwise(bounds.tolist()):
        rows = order[start:end]
        samples = tuple(zip(group[rows].tolist(), ids[rows].tolist(), epoch[rows].tolist(), strict=True))
        bins.append(Bin(samples, int(tokens[rows].sum()), float(costs[rows].sum())))
    return bins
