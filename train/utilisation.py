"""How much of the device a run uses: what it could do at best, for the model FLOPs utilisation (Chowdhery et al. 2022), and memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from mmctx.train.config import TrainConfig

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA B200": {"bf16": 2250, "fp32": 75},
    "NVIDIA H200": {"bf16": 989.4, "fp32": 66.9},
    "NVIDIA H100 80GB HBM3": {"bf16": 989.4, "fp32": 66.9},
    "NVIDIA H100 NVL": {"bf16": 835.5, "fp32": 60.0},
    "NVIDIA H100 PCIe": {"bf16": 756.0, "fp32": 51.0},
    "NVIDIA GH200 480GB": {"bf16": 989.4, "fp32": 66.9},
    "NVIDIA A100-SXM4-80GB": {"bf16": 311.9, "fp32": 19.5},
    "NVIDIA A100-SXM4-40GB": {"bf16": 311.9, "fp32": 19.5},
    "NVIDIA A100 80GB PCIe": {"bf16": 311.9, "fp32": 19.5},
    "NVIDIA A100-PCIE-40GB": {"bf16": 311.9, "fp32": 19.5},
    "NVIDIA L40S": {"bf16": 362.1, "fp32": 91.6},
    "NVIDIA L4": {"bf16": 121.0, "fp32": 30.3},
    "NVIDIA A10G": {"bf16": 70.0, "fp32": 35.0},
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp32": 82.6},
    "NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp32": 35.6},
}
"""TFLOP/s of dense products with float32 sums, by the device's name, from NVIDIA's data sheets; fp32 is without TF32, which stays off."""


class Utilisation:
    """What the devices of a run can do, against what they do.

    Args:
        config: of the run.
        accelerator: of this process.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self._device, self._processes = accelerator.device, accelerator.num_processes
        self._peak = peak_flops(accelerator.device, config.precision, config.peak_tflops)

    def line(self, flops_per_s: float, gather: Callable[[Any], list[Any]]) -> dict[str, float | int | None]:
        """For a line of metrics: model FLOP/s of all processes, their share of what is possible, and the largest peak of memory.

        Args:
            flops_per_s: of all processes.
            gather: tells a value to all ranks, see `Sums.gather`.
        """
        return {
            "flops_per_s": flops_per_s,
            "mfu": None if self._peak is None else flops_per_s / (self._peak * self._processes),
            "peak_memory": max(gather(peak_memory(self._device))),
        }


def peak_flops(device: torch.device, precision: str, tflops: float | None) -> float | None:
    """FLOP/s that one device could do at best, None where nobody knows.

    Args:
        device: that a process trains on.
        precision: `bf16` or `fp32`.
        tflops: `train.peak_tflops`, which goes before the table.
    """
    if tflops is None and device.type == "cuda":
        tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name(device), {}).get(precision)
    return None if tflops is None else tflops * 1e12


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU as PyTorch counts them, else of main memory as the system does."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
