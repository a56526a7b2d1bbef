"""What the ranks of a run know together: what a global step holds, losses as parts of one mean, numbers for a line of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from mmctx.fingerprint import as_signed, bin_fingerprint, combine, show
from mmctx.model import MmctxModel
from mmctx.objectives import ComparingHalf, Roster
from mmctx.pack import PackedBatch
from mmctx.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Muster:
    """What a global step holds, known to all ranks before it is computed. On the host.

    Attributes:
        counts: predictions of each objective: what its loss is divided by.
        negatives: of each `ComparingHalf`, candidates that its predictions are told from, all in all.
        roster: who embeds what.
    """

    counts: Mapping[str, int]
    negatives: Mapping[str, int]
    roster: Roster


class Sums:
    """Sums over all ranks. What is on the host is added up on the host, over gloo: nobody waits for a GPU.

    Args:
        accelerator: of the run. Each rank makes its `Sums` at the same time.
        mesh: this rank's place: what a whole group counted is added once.
    """

    def __init__(self, accelerator: Accelerator, mesh: Mesh) -> None:
        self._accelerator, self._mesh = accelerator, mesh
        self._alone = accelerator.num_processes == 1
        self._group: Any = None if self._alone else dist.group.WORLD
        over_gloo = self._alone or accelerator.device.type == "cpu"
        self._host_group: Any = self._group if over_gloo else dist.new_group(backend="gloo")

    def muster(
        self, model: MmctxModel, numbers: Sequence[int], whole: Sequence[PackedBatch], parts: Sequence[PackedBatch]
    ) -> Muster:
        """What the global step holds.

        Args:
            model: whose objectives count.
            numbers: of this rank's micro-batches among those of the step.
            whole: this rank's micro-batches; the ranks of a sequence parallel group have the same ones.
            parts: what it computes of them.
        """
        halves: dict[str, Any] = {**model.objectives}
        additive = {name: half for name, half in halves.items() if not isinstance(half, ComparingHalf)}
        comparing = {name: half for name, half in halves.items() if isinstance(half, ComparingHalf)}
        counted = [sum(half.count(batch) for batch in whole) for half in additive.values()]  # type: ignore[operator]
        own = self._mesh.once(counted)
        everyone = self.gather((own, [batch.pairs for batch in parts], list(numbers)))
        counts = dict(
            zip(additive, (sum(column) for column in zip(*(n for n, _, _ in everyone), strict=True)), strict=True)
        )
        entries, places = [e for _, e, _ in everyone], [n for _, _, n in everyone]
        roster = Roster(entries, places, self._accelerator.process_index, self._group)
        return Muster(
            counts | {name: half.count_all(roster) for name, half in comparing.items()},
            {name: half.count_negatives(roster) for name, half in comparing.items()},
            roster,
        )

    def gather(self, something: Any) -> list[Any]:
        """What each rank has, in the order of ranks; nothing that lies on a device."""
        if self._alone:
            return [something]
        found: list[Any] = [None] * self._accelerator.num_processes
        dist.all_gather_object(found, something, self._host_group)
        return found

    def of(self, numbers: Sequence[int]) -> list[int]:
        """Integers of every rank, added up."""
        return [sum(column) for column in zip(*self.gather(list(numbers)), strict=True)]

    def of_batches(self, numbers: list[int]) -> list[int]:
        """As `of`, for what all ranks that share a batch have counted."""
        return self.of(self._mesh.once(numbers))

    def fingerprint(self, bins: Sequence[tuple[int, PackedBatch]]) -> str:
        """Of the global batch, from the numbered bins of each rank."""
        return show(self.of_batches([as_signed(combine(bin_fingerprint(*bin) for bin in bins))])[0])

    def loss(self, totals: Mapping[str, Tensor], counts: Mapping[str, int], weights: Mapping[str, float]) -> Tensor:
        """The loss of a global step from each rank's share of the sums, a scalar on the device; waits for nothing."""
        parts = [weights[name] * total.detach() / max(counts[name], 1) for name, total in totals.items()]
        return self._accelerator.reduce(torch.stack(parts).sum(), reduction="sum")  # type: ignore[return-value]

    def of_losses(self, totals: Tensor) -> list[float]:
        """Sums of losses (objectives,), added up over the ranks; waits for the device."""
        return self._accelerator.reduce(totals, reduction="sum").tolist()  # type: ignore[union-attr]
