"""What a suite works on: a model, and held-out data read in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import plan_once
from mmctx.eval.config import EvalConfig
from mmctx.model import MmctxModel
from mmctx.objectives import AnyObjective
from mmctx.pack import PackedBatch


@dataclass(frozen=True)
class EvalContext:
    """A model in evaluation mode and the held-out sources.

    Attributes:
        model: on `device`.
        data: held-out sources.
        objectives: the run's objectives by name.
        config: lengths and numbers of examples.
        device: where batches go.
        bf16: products run in bfloat16, as the run was trained.
        progress: called with (suite, done, total).
    """

    model: MmctxModel
    data: RunData
    objectives: Mapping[str, AnyObjective]
    config: EvalConfig
    device: torch.device
    bf16: bool = False
    progress: Callable[[str, int, int], None] | None = None

    def names(self, kind: str) -> list[str]:
        """Objectives of one kind that some held-out source serves."""
        served = {name for _, config in self.data.dataset.sources for name in config.objectives}
        return [name for name, objective in self.objectives.items() if objective.kind == kind and name in served]

    def batches(self, suite: str, objective: str | None = None) -> Iterator[PackedBatch]:
        """Every held-out sample once, packed; with `objective`, that objective's documents alone."""
        data = self.data.only(objective) if objective else self.data
        bins = plan_once(list(data.tables.values()), data.config.bin_tokens)
        for done, bin in enumerate(bins):
            self.report(suite, done, len(bins))
            yield data.dataset[bin].to(self.device)
        self.report(suite, len(bins), len(bins))

    def report(self, suite: str, done: int, total: int) -> None:
        """Tells the caller how far a suite is."""
        if self.progress is not None:
            self.progress(suite, done, total)
