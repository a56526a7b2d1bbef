"""What the sections of `gpu.py` share: devices, timing, and results that survive a failure."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets (SXM)."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_flops() -> float | None:
    """Of this GPU; None where it is not known."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def wait() -> None:
    """Until the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
    """Of the fastest of `repeats` calls."""
    best = float("inf")
    for turn in range(warm_up + repeats):
        wait()
        started = time.perf_counter()
        function()
        wait()
        if turn >= warm_up:
            best = min(best, time.perf_counter() - started)
    return best


def attempt(emit: Callable[..., None], case: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Measures one case and emits it; an error is emitted instead, and the next case can run."""
    try:
        found = measure()
    except Exception as error:  # out of memory, kernels that refuse: the other cases are still wanted
        found = None
        emit(case=case, error=f"{type(error).__name__}: {str(error).strip()[:300]}")
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    if found is not None:
        emit(case=case, **found)
    return found


def peak_gib() -> float | None:
    """Most GPU memory that was in use since the last call; None on a CPU."""
    if DEVICE.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)
