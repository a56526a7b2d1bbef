"""The optimizer's state by the names of parameters: it then belongs to no order of parameters, no number of ranks and no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmctx.errors import CheckpointError


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{"NAME/exp_avg": tensor}`. Learning rates and the like are not in it: the configuration says them."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"optimizer state {key!r} of {name} is a {type(value).__name__}, only tensors can be saved"
                )
            found[f"{name}/{key}"] = value
    return found


def restore_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Gives an optimizer what `named_state` found; `where` names the origin in errors.

    Raises:
        CheckpointError: it is the state of other parameters.
    """
    parameters = dict(model.named_parameters())
    numbers = {id(p): number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        name, _, key = place.rpartition("/")
        if name not in parameters or id(parameters[name]) not in numbers:
            raise CheckpointError(
                f"{where}: holds {place!r}, but the optimizer has no parameter {name!r}; set run.name to start a new run"
            )
        state.setdefault(numbers[id(parameters[name])], {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder that one process wrote.

    Raises:
        CheckpointError: a file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found |= load_file(path)
        except Exception as error:  # safetensors raises its own types
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return found
