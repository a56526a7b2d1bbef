"""What a suite works on: a model, held-out data read in full, and this rank's share of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin, plan_once
from mmctx.eval.config import EvalConfig
from mmctx.model import MmctxModel
from mmctx.objectives import AnyObjective
from mmctx.pack import PackedBatch

Item = TypeVar("Item")
Found = TypeVar("Found")


def _alone(found: Any) -> list[Any]:
    return [found]


@dataclass(frozen=True)
class Ranks:
    """The processes that evaluate together.

    Attributes:
        rank: this one's number.
        size: of them all.
        gather: what each rank has, in the order of ranks; called by all of them at the same time, with host objects.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _alone


@dataclass(frozen=True)
class EvalContext:
    """A model in evaluation mode and the held-out sources.

    Attributes:
        model: on `device`, whole on every rank.
        data: held-out sources.
        objectives: the run's objectives by name.
        config: lengths and numbers of examples.
        device: where batches go.
        bf16: products run in bfloat16, as the run was trained.
        progress: called with (suite, done, total).
        ranks: who shares the work.
    """

    model: MmctxModel
    data: RunData
    objectives: Mapping[str, AnyObjective]
    config: EvalConfig
    device: torch.device
    bf16: bool = False
    progress: Callable[[str, int, int], None] | None = None
    ranks: Ranks = Ranks()

    def names(self, kind: str) -> list[str]:
        """Objectives of one kind that some held-out source serves."""
        served = {name for _, config in self.data.dataset.sources for name in config.objectives}
        return [name for name, objective in self.objectives.items() if objective.kind == kind and name in served]

    def map(self, suite: str, items: Sequence[Item], work: Callable[[Item], Found]) -> list[Found]:
        """What `work` finds for every item, in their order, on every rank: each item is worked on once, by one rank.

        Since a rank works on whole items and adds nothing up, a suite that reads nothing but this list gives the same numbers on any
        number of ranks. `work` returns host objects that pickle can carry; it runs without gradients.
        """
        mine = range(self.ranks.rank, len(items), self.ranks.size)
        found = []
        with torch.no_grad():
            for done, number in enumerate(mine):
                self.report(suite, done, len(mine))
                found.append(work(items[number]))
        self.report(suite, len(mine), len(mine))
        everyone = self.ranks.gather(found)
        return [everyone[number % self.ranks.size][number // self.ranks.size] for number in range(len(items))]

    def bins(self, objective: str | None = None) -> tuple[RunData, list[Bin]]:
        """Every held-out sample once; with `objective`, to make that objective's documents alone.

        Returns:
            The data, and its bins: `data.dataset[bin]` is a packed batch.
        """
        data = self.data.only(objective) if objective else self.data
        return data, plan_once(list(data.tables.values()), data.config.bin_tokens)

    def map_batches(
        self, suite: str, work: Callable[[PackedBatch], Found], objective: str | None = None
    ) -> list[Found]:
        """As `map`, over packed batches of every held-out sample, on the device."""
        data, bins = self.bins(objective)
        return self.map(suite, bins, lambda bin: work(data.dataset[bin].to(self.device)))

    def report(self, suite: str, done: int, total: int) -> None:
        """Tells the caller how far a suite is."""
        if self.progress is not None:
            self.progress(suite, done, total)


def each(parts: Sequence[Sequence[Found]]) -> Iterator[Found]:
    """The entries of all parts, in order: what `map` found, where each item gives several."""
    for part in parts:
        yield from part
