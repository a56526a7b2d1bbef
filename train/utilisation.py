"""How much of the device a run uses: what it could do at best, for the model FLOPs utilisation (Chowdhery et al. 2022), and memory."""

from __future__ import annotations

import resource
import sys

import torch

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
