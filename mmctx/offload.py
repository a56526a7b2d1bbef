"""Activations that wait in host memory for their backward pass, copied beside the computation.

Each layer's copies run on a stream of their own. Going out, a layer's tensors are released when the next layer begins, which waits for
their copy. Coming back, the copy of a layer starts when the backward pass of the layer above it starts, so at most two layers are on the
device. Order between the streams alone keeps memory safe: `record_stream` would not free it before the host, which runs far ahead, has
asked for more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
"""Smaller tensors stay: a copy costs more than it frees."""


@dataclass(slots=True, eq=False)
class _Parked:
    """One tensor on its way out, away or back.

    Attributes:
        layer: number of the layer that saved it.
        host: its copy.
        here: the tensor on the device, while it is there.
        back: when its way back is over.
    """

    layer: int
    host: Tensor
    here: Tensor | None
    back: torch.cuda.Event | None = None


class HostOffload:
    """Moves what autograd saves in some layers to the host and back; one object serves one forward and its backward.

        offload = HostOffload(x.device)
        for block in blocks:
            with offload.layer():
                x = block(x)

    Args:
        device: where the tensors are. On CPU they are copied as well, which tests rely on; the trunk does not ask for that.
        min_bytes: smaller tensors are left alone.
    """

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES) -> None:
        self.min_bytes = min_bytes
        self.side = _side_stream(device) if device.type == "cuda" else None
        self.layers: list[list[_Parked]] = []

    @contextmanager
    def layer(self) -> Iterator[None]:
        """What is saved inside belongs to the next layer."""
        if self.layers:
            self._release(self.layers[-1])
        self.layers.append([])
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Parked:
        if tensor.nbytes < self.min_bytes or isinstance(tensor, torch.nn.Parameter):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.side is not None, requires_grad=False)
        with self._beside():
            host.copy_(tensor.detach(), non_blocking=True)
        parked = _Parked(len(self.layers) - 1, host, tensor.detach())
        self.layers[-1].append(parked)
        return parked

    def _unpack(self, saved: Tensor | _Parked) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        layer = self.layers[saved.layer]
        if saved in layer:  # no longer so where a graph is gone through again
            layer.remove(saved)
        if saved.here is None:  # nobody fetched it ahead of time, as for the first layer of a backward pass
            self._fetch([saved])
        if saved.back is not None and self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_event(saved.back)
        tensor, saved.here = saved.here, None
        assert tensor is not None
        if saved.layer:
            self._fetch(self.layers[saved.layer - 1])
        return tensor

    def _fetch(self, layer: list[_Parked]) -> None:
        """Starts the way back of a layer, after all that was asked of the device so far: it may still read memory that is used again."""
        missing = [parked for parked in layer if parked.here is None]
        if not missing:
            return
        with self._beside():
            for parked in missing:
                device = "cpu" if self.side is None else self.side.device
                parked.here = parked.host.to(device, non_blocking=True, copy=True)
                parked.back = None if self.side is None else self.side.record_event()  # type: ignore[assignment]

    def _release(self, layer: list[_Parked]) -> None:
        """Lets go of the device's copies; what is computed from now on waits until they have left."""
        if self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)
        for parked in layer:
            parked.here = None

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the side stream, after all that was asked of the device so far."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            yield


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
