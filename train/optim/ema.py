"""Averaged weights, which often score better than the last ones (Polyak and Juditsky 1992): a moving average of all parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmctx.config import StrictModel
from mmctx.errors import CheckpointError

EMA_FILE = "ema.safetensors"
"""In a checkpoint's folder `trainer`."""


class EmaConfig(StrictModel):
    """An average of the weights beside those that are trained, in float32."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share of the average that an update keeps."""
    every: int = Field(default=1, ge=1)
    """Steps from one update to the next."""
    warmup: bool = True
    """Update n (from 0) keeps at most (1 + n) / (10 + n), so that the first weights are soon forgotten (as TensorFlow's
    ExponentialMovingAverage)."""


class Ema:
    """The average of a model's parameters: `average = keep * average + (1 - keep) * weights` every few steps.

    What an update keeps is a function of the step alone, so the average is the only state.

    Args:
        model: on its device, as it is trained.
        config: how slowly it follows.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self._parameters = dict(model.named_parameters())
        self.average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    def keep(self, step: int) -> float:
        """What the update after `step` steps (a multiple of `every`) keeps."""
        updates = step // self.config.every - 1
        return min(self.config.decay, (1 + updates) / (10 + updates)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after each step, with the number of steps done; most calls may do nothing. Never waits for the device."""
        if step % self.config.every:
            return
        weights = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.keep(step))  # type: ignore[attr-defined]

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Takes over what a checkpoint holds.

        Raises:
            ValueError: it is of another model.
        """
        if average.keys() != self.average.keys():
            name = min(average.keys() ^ self.average.keys())
            raise ValueError(f"{name!r} is {'only' if name in average else 'not'} in the saved average")
        for name, tensor in self.average.items():
            whole = average[name].to(tensor.device)
            if isinstance(tensor, DTensor):  # this rank's part of it
                whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
            tensor.copy_(whole)


def save_ema(average: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the average, on the host, beside the optimizer, in a checkpoint's folder `trainer`."""
    save_file(dict(average), folder / EMA_FILE, {"format": "pt"})


def read_ema(folder: Path) -> dict[str, Tensor]:
    """The average that `save_ema` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / EMA_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: the checkpoint holds no average of weights; it is kept where train.ema is set")
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types for damaged files
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def load_ema(model: nn.Module, checkpoint: Path) -> None:
    """Puts a checkpoint's averaged weights in place of a model's parameters; buffers stay.

    Raises:
        CheckpointError: there is no average, or it is of another model.
    """
    average = read_ema(checkpoint / "trainer")
    names = {name for name, _ in model.named_parameters()}
    if average.keys() != names:
        raise CheckpointError(
            f"{checkpoint}: {EMA_FILE} holds other tensors than the model: {min(average.keys() ^ names)}"
        )
    model.load_state_dict(average, strict=False)
