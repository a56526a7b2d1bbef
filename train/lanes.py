"""The memories of streams in a run: handed to the batches that go on with them, kept with checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmctx.datasets.planning.plan import Bin
from mmctx.errors import CheckpointError
from mmctx.lane import Lane
from mmctx.pack import PackedBatch
from mmctx.train.sums import Sums

LANES = "lanes.safetensors"
"""File of a checkpoint's `trainer` folder."""


class Lanes:
    """This rank's lanes. A lane's memory is a function of the run's steps, as weights are: restored with them, it goes on bit by bit.

    Args:
        device: where the model is.
        saved: what `state` gave on every rank; a rank takes up the lanes that it meets.
    """

    def __init__(self, device: torch.device, saved: Mapping[str, Tensor] | None = None) -> None:
        self.device = device
        self._saved: dict[int, dict[str, Tensor]] = {}
        for name, tensor in (saved or {}).items():
            number, _, rest = name.partition(".")
            self._saved.setdefault(int(number), {})[rest] = tensor
        self._lanes: dict[int, Lane] = {}
        self._open: list[Lane] = []

    def clear(self) -> None:
        """Forgets everything: another plan begins."""
        self._lanes, self._saved, self._open = {}, {}, []

    def attach(self, bins: Sequence[Bin], batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches of this rank's bins of a step, those that hold a piece with the memory of their lane."""
        self._open = []
        return [self._attach(bin.lane, batch) for bin, batch in zip(bins, batches, strict=True)]

    def _attach(self, number: int | None, batch: PackedBatch) -> PackedBatch:
        if number is None or batch.stream_start is None:  # it could not be read
            return batch
        if number not in self._lanes:
            saved = self._saved.pop(number, None)
            self._lanes[number] = Lane() if saved is None else Lane.restored(saved, self.device)
        lane = self._lanes[number]
        lane.open(batch.stream_start)
        self._open.append(lane)
        return replace(batch, lane=lane)

    def commit(self) -> None:
        """The step has been taken."""
        for lane in self._open:
            lane.commit()
        self._open = []

    def state(self) -> dict[str, Tensor]:
        """Tensors of all lanes of this rank, on the host."""
        return {f"{n}.{name}": tensor.cpu() for n, lane in self._lanes.items() for name, tensor in lane.state().items()}

    def everybodys(self, sums: Sums) -> dict[str, Tensor]:
        """Tensors of the lanes of all ranks, which all call it. They travel over the host, whole."""
        return {name: tensor for state in sums.gather(self.state()) for name, tensor in state.items()}


def read_lanes(checkpoint: Path) -> dict[str, Tensor]:
    """The memories of a checkpoint; none where the run had no streams.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / "trainer" / LANES
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types for damaged files
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete {checkpoint} to fall back to the one before it"
        ) from None
