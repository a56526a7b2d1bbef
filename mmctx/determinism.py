"""PyTorch's deterministic mode, switched on for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmctx.errors import ConfigError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":4096:8", ":16:8")  # those that cuBLAS promises the same bits for


@contextmanager
def deterministic_algorithms(enabled: bool = True) -> Iterator[None]:
    """Inside, operations give the same bits each time or raise; afterwards all is as it was. Does nothing unless `enabled`.

    Attention follows: its backends look at the same switch (`torch.are_deterministic_algorithms_enabled`).

    Raises:
        ConfigError: cuBLAS has started, or been told otherwise, so that it can no longer be made deterministic.
    """
    if not enabled:
        yield
        return
    _prepare_cublas()
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _prepare_cublas() -> None:
    if not torch.cuda.is_available():
        return
    value = os.environ.get(_CUBLAS)
    if value is not None and value not in _CUBLAS_VALUES:
        raise ConfigError(
            f"deterministic training needs the environment variable {_CUBLAS} to be {' or '.join(_CUBLAS_VALUES)}, "
            f"found {value!r}; unset it, or set train.deterministic=false"
        )
    if value is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"deterministic training needs {_CUBLAS}={_CUBLAS_VALUES[0]} before anything runs on the GPU; set it in the "
            "environment and start Python again"
        )
    os.environ.setdefault(_CUBLAS, _CUBLAS_VALUES[0])
