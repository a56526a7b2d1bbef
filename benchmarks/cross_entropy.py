"""Cross entropy of a linear head (bar C2): memory and time against whole logits and against PyTorch's own chunked loss.

    python benchmarks/cross_entropy.py [--json] [--quick] [--repeats 3]

8,192 tokens, width 512, 32,768 words, forward and backward on one thread, in float32 and bfloat16. Sides:

- naive: `F.cross_entropy` of whole logits;
- torch: `torch.nn.functional.linear_cross_entropy` with chunks (PyTorch 2.13 and newer);
- ours: `mmctx.objectives.linear_cross_entropy`.

Memory is the peak of a fresh process over what it held before the loss: operands are not counted, gradients are. Time is the best of
turns in one process, by the clock and by the processor. First the loss of every side, and its gradient, are set against float64 on a
smaller problem: ours is asserted, the others are shown (torch's loss is wrong in bfloat16).

Processors without bf16 matrix products (most without AVX-512) make PyTorch multiply element by element, a hundred times slower. There,
naive is given products by way of float32, and torch's own is left out in bfloat16. Ours goes by way of float32 wherever that is faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import best_in_turns, machine, parse, report, run_peer, versions

sys.path.insert(0, str(Path(__file__).parent / "sides"))
from cross_entropy_side import SIDES, has_bf16_products, problem

SCRIPT = Path(__file__).parent / "sides" / "cross_entropy_side.py"
BARS = {"memory": 15.0, "float32": 1.0, "bfloat16": 0.65}
"""Naive's peak over ours; our seconds over naive's."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": (1e-6, 1e-5), "bfloat16": (1e-4, 2e-2)}
"""Of our loss, relative, and of our gradients, relative to the largest element."""


def sides_of(dtype: str) -> list[str]:
    """Who can run here."""
    missing = not hasattr(torch.nn, "LinearCrossEntropyOptions") or (dtype == "bfloat16" and not has_bf16_products())
    return [side for side in SIDES if side != "torch" or not missing]


def errors(dtype: str) -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradients against float64, after asserting ours; small enough for slow bf16 products."""
    shape = (1024, 64, 4096)
    exact = problem(torch.float64, *shape)
    want = F.cross_entropy(exact[0] @ exact[1].T, exact[2], reduction="sum")
    want_gradients = torch.autograd.grad(want, exact[:2])
    found = {}
    for side, function in SIDES.items():
        if side == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            continue
        hidden, weight, labels = problem(DTYPES[dtype], *shape)
        loss = function(hidden, weight, labels)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        pairs = zip(gradients, want_gradients, strict=True)
        found[side] = {
            "loss": abs(loss.item() / want.item() - 1),
            "gradient": max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs),
        }
    for error, tolerance in zip(found["ours"].values(), TOLERANCES[dtype], strict=True):
        assert error <= tolerance, f"{dtype}: our loss and gradient are off by {found['ours']}"
    return found


def measure(dtype: str, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Peak memory and best time of each side, and our bars' ratios."""
    hidden, weight, labels = problem(DTYPES[dtype], *shape)

    def run(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def once() -> None:
            function(hidden, weight, labels).backward()
            hidden.grad = weight.grad = None

        return once

    names = sides_of(dtype)
    arguments = [dtype, *map(str, shape)]
    peaks = {side: run_peer(Path(sys.executable), SCRIPT, side, *arguments)["peak_mib"] for side in names}
    best = best_in_turns({side: run(SIDES[side]) for side in names}, repeats)
    return {
        "peak_mib": {side: round(peak, 1) for side, peak in peaks.items()},
        "seconds": {side: round(found["clock"], 3) for side, found in best.items()},
        "times_less_memory": {side: round(peaks[side] / peaks["ours"], 2) for side in names if side != "ours"},
        "time_ratio": {
            by: {side: round(best["ours"][by] / best[side][by], 3) for side in names if side != "ours"}
            for by in ("clock", "processor")
        },
    }


def main() -> None:
    arguments = parse(__doc__, repeats=3)
    torch.set_num_threads(1)
    shape = (256, 32, 1024) if arguments.quick else (8192, 512, 32768)
    result: dict[str, Any] = {"errors": {dtype: errors(dtype) for dtype in DTYPES}}
    result |= {dtype: measure(dtype, shape, arguments.repeats) for dtype in DTYPES}
    result |= {
        "bf16_products": has_bf16_products(),
        "bars": BARS,
        "machine": machine(),
        "versions": versions("torch", "mmctx"),
    }
    lines = []
    for dtype in DTYPES:
        found = result[dtype]
        lines.append(dtype)
        for side, peak in found["peak_mib"].items():
            error = result["errors"][dtype][side]
            lines.append(
                f"  {side:<6} peak {peak:8.1f} MiB, {found['seconds'][side]:7.3f} s; off by {error['loss']:.1e} (loss), "
                f"{error['gradient']:.1e} (gradient)"
            )
        if "torch" not in found["peak_mib"] and "torch" in result["errors"][dtype]:
            lines.append(
                f"  torch  left out: no bf16 products here; loss off by {result['errors'][dtype]['torch']['loss']:.1e}"
            )
        lines.append(f"  times less memory {found['times_less_memory']}, our time over theirs {found['time_ratio']}")
    report(result, [*lines, f"bars {BARS}"], arguments.json)


if __name__ == "__main__":
    main()
