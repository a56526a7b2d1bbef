"""Sums over all ranks: predictions of a step, losses as parts of one mean, numbers for a line of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmctx.objectives import LossSum
from mmctx.pack import PackedBatch
from mmctx.parallel.mesh import Mesh


class Sums:
    """What the ranks of a run know together.

    Args:
        accelerator: of the run.
        mesh: this rank's place: what a whole group counted is added once.
    """

    def __init__(self, accelerator: Accelerator, mesh: Mesh) -> None:
        self._accelerator, self._mesh = accelerator, mesh

    def predictions(self, heads: nn.ModuleDict, micro_batches: Sequence[PackedBatch]) -> Mapping[str, int | Tensor]:
        """Predictions of each objective in the whole global step. With several ranks they stay on the device: nobody waits for them."""
        counts = {name: sum(head.count(batch) for batch in micro_batches) for name, head in heads.items()}  # type: ignore[operator]
        if self._accelerator.num_processes == 1:
            return counts
        local = torch.tensor(self._mesh.once(list(counts.values()))).to(self._accelerator.device, non_blocking=True)
        return dict(zip(counts, self._accelerator.reduce(local, reduction="sum").unbind(), strict=True))  # type: ignore[union-attr]

    def objective(
        self, losses: Mapping[str, LossSum], counts: Mapping[str, int | Tensor], weights: Mapping[str, float]
    ) -> Tensor:
        """Weighted sum of means over the whole global step; times the ranks, because DDP averages gradients over them."""
        parts = []
        for name, loss in losses.items():
            count = counts[name]
            divisor = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
            parts.append(weights[name] * loss.total / divisor)
        return torch.stack(parts).sum() * self._accelerator.num_processes

    def of(self, numbers: list[int]) -> list[int]:
        """Integers of every rank, added up; waits for the device."""
        if self._accelerator.num_processes == 1:
            return numbers
        local = torch.tensor(numbers, device=self._accelerator.device)
        return self._accelerator.reduce(local, reduction="sum").tolist()  # type: ignore[union-attr]

    def of_batches(self, numbers: list[int]) -> list[int]:
        """As `of`, for what all ranks that share a batch have counted."""
        return self.of(self._mesh.once(numbers))

    def of_losses(self, totals: Tensor) -> list[float]:
        """Sums of losses (objectives,), added up over the ranks; waits for the device."""
        return self._accelerator.reduce(totals, reduction="sum").tolist()  # type: ignore[union-attr]
