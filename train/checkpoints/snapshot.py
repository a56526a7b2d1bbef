"""Copies of tensors in host memory, which a thread may write while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """Host copies whose memory is used again by the next ones.

    On CUDA the memory is pinned and copies run on the current stream: the host does not wait, and what changes the tensors next comes after
    them on the device.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors` by the same names. Earlier copies of the same names are lost."""
        return {name: self.copy(name, tensor) for name, tensor in tensors.items()}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of one tensor, which may still be on its way: see `Copied`."""
        tensor = tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(tensor, non_blocking=True)
        return buffer


class Copied:
    """The moment at which all copies that were asked for have arrived."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """All copies have been asked for."""
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Until they are there; for the thread that reads them."""
        if self._event is not None:
            self._event.synchronize()
