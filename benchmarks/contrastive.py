"""Contrastive losses (bar C3): memory and time against open_clip's ClipLoss and SigLipLoss, whose matrices of scores are whole.

    python benchmarks/contrastive.py [--json] [--quick] [--repeats 3]

8,192 pairs of 512 channels, forward and backward on one thread, float32. Losses and gradients of both sides are asserted equal first.
Memory is the peak of a fresh process over what it held before the loss; embeddings are not counted, their gradients are. Ours is taken at
half as many and at twice as many pairs, too: it must grow with the pairs, not with their square.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from common import best_in_turns, machine, parse, report, run_peer, versions

sys.path.insert(0, str(Path(__file__).parent / "sides"))
from contrastive_side import SIDES, problem

SCRIPT = Path(__file__).parent / "sides" / "contrastive_side.py"
BARS = {"memory": 4.0, "time": 0.75}
"""open_clip's peak over ours; our seconds over theirs."""
LOSSES = ("softmax", "sigmoid")


def assert_equal(loss: str, pairs: int, channels: int) -> None:
    """Loss to 1e-5, gradients to 1e-4 of the largest element."""
    found = {}
    for side, function in SIDES.items():
        tensors = problem(loss, pairs, channels)
        value = function(loss, *tensors)
        used = tensors if loss == "sigmoid" else tensors[:3]
        found[side] = [value, *torch.autograd.grad(value, used)]
    for place, (ours, theirs) in enumerate(zip(found["ours"], found["open_clip"], strict=True)):
        error = float(((ours - theirs).abs().max() / theirs.abs().max()).detach())
        assert error < (1e-4 if place else 1e-5), f"{loss}: tensor {place} is off by {error}"


def peak(side: str, loss: str, pairs: int, channels: int) -> float:
    """MiB, in a process of its own."""
    return run_peer(Path(sys.executable), SCRIPT, side, loss, str(pairs), str(channels))["peak_mib"]


def measure(loss: str, pairs: int, channels: int, repeats: int) -> dict[str, Any]:
    """Peaks, best times and their ratios."""
    assert_equal(loss, min(pairs, 1024), channels)
    tensors = problem(loss, pairs, channels)
    peaks = {side: peak(side, loss, pairs, channels) for side in SIDES}
    growth = {n: peak("ours", loss, n, channels) for n in (pairs // 2, 2 * pairs)} | {pairs: peaks["ours"]}
    best = best_in_turns(
        {side: lambda f=function: f(loss, *tensors).backward() for side, function in SIDES.items()}, repeats
    )
    return {
        "peak_mib": {side: round(mib, 1) for side, mib in peaks.items()},
        "our_peak_mib": {n: round(mib, 1) for n, mib in sorted(growth.items())},
        "times_less_memory": round(peaks["open_clip"] / peaks["ours"], 2),
        "seconds": {side: round(found["clock"], 3) for side, found in best.items()},
        "time_ratio": {by: round(best["ours"][by] / best["open_clip"][by], 3) for by in ("clock", "processor")},
    }


def main() -> None:
    arguments = parse(__doc__, repeats=3)
    torch.set_num_threads(1)
    pairs, channels = (256, 32) if arguments.quick else (8192, 512)
    result: dict[str, Any] = {loss: measure(loss, pairs, channels, arguments.repeats) for loss in LOSSES}
    result |= {"bars": BARS, "machine": machine(), "versions": versions("torch", "open_clip_torch", "mmctx")}
    lines = []
    for loss in LOSSES:
        found = result[loss]
        lines += [
            f"{loss}: peak {found['peak_mib']} MiB, {found['times_less_memory']} times less; by pairs {found['our_peak_mib']}",
            f"  {found['seconds']} s; our time over theirs {found['time_ratio']}",
        ]
    report(result, [*lines, f"bars {BARS}"], arguments.json)


if __name__ == "__main__":
    main()
