"""Functions over tokens that may run compiled, once for all blocks and for any number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")


def run(backend: str | None, function: Callable[..., R], module: nn.Module, *tensors: Tensor) -> R:
    """`function(module, *tensors)`, compiled by this backend of `torch.compile`, or as it is for None.

    The first dimension of every tensor is a number of tokens that changes from step to step. It is marked as such, so that the first
    compilation serves all later steps; PyTorch raises an error if something in `function` would fix it. Weights are inputs of the compiled
    code: modules of one shape share it.
    """
    if backend is None or len(tensors[0]) < 2:  # for a single row, as at the end of tiles, PyTorch would compile anew
        return function(module, *tensors)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
    return _compiled(function, backend)(module, *tensors)


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True)
