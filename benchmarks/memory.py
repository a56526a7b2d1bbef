"""Activation memory of a training step by token (bar C8): ours against Transformers' Llama, plain and checkpointed.

    python benchmarks/memory.py [--json] [--quick] [--repeats 1]

One document, float32, L6 d256 h4 ff768 V32768 with tied embeddings. Both sides have the same weights and ids, and it is asserted that
losses and norms of gradients are equal. Every point is a fresh process: forward and backward pass, with gradients allocated before, so that
only activations and passing buffers count. Memory is what PyTorch's allocator held at the worst moment, from the profiler's record of
every allocation, those inside of kernels included: it is exact and does not scatter. Beside it stands how much the largest resident size
of the process grew (`ru_maxrss`), as a check from outside.

How memory grows is measured with windows of 512 in five of the six layers, as 65,536 tokens in all of them would take most of an hour. Few
of the bytes are attention's: at 8,192 tokens the numbers with and without windows can be compared.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import machine, parse, report, versions

SIDE = Path(__file__).parent / "sides" / "memory_side.py"
SIZES = {"vocab": 32768, "width": 256, "mlp_width": 768, "depth": 6, "heads": 4}
QUICK = {"vocab": 512, "width": 64, "mlp_width": 128, "depth": 2, "heads": 1}
BAR = 5.0
"""Checkpointed Transformers over ours, bytes."""
BAR_FLAT = 1.15
"""Most over least bytes per token from 8k to 64k."""
OURS: dict[str, dict[str, Any]] = {
    "ours, all kept": {},
    "ours, selective": {"checkpoint": "selective"},
    "ours, full": {"checkpoint": "full"},
    "ours, full and tiles": {"checkpoint": "full", "mlp_tile": 1024},
}
BEST = "ours, full and tiles"
WINDOWED = [512, 512, 512, 512, 512, None]


def measure(tokens: int, quick: bool, **settings: Any) -> dict[str, float]:
    """One point in its process."""
    whole = {"tokens": tokens, "sizes": QUICK if quick else SIZES, "threads": os.cpu_count(), **settings}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, str(SIDE), json.dumps(whole)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{settings}: {done.stderr[-2000:]}")
    found = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    found["kib_per_token"] = round(found["peak"] / tokens / 1024, 1)
    found["resident_kib_per_token"] = round(found["resident"] / tokens / 1024, 1)
    print(f"{tokens} tokens, {settings}: {found}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    arguments = parse(__doc__, repeats=1)
    tokens = 512 if arguments.quick else 8192
    lengths = [512, 1024] if arguments.quick else [8192, 16384, 32768, 65536]
    ours = {name: OURS[name] for name in ("ours, all kept", BEST)} if arguments.quick else OURS
    sides: dict[str, dict[str, Any]] = {
        "Transformers": {"side": "transformers", "checkpoint": False},
        "Transformers, checkpointed": {"side": "transformers", "checkpoint": True},
        **{name: {"side": "ours", "activations": kept, "windows": [None]} for name, kept in ours.items()},
    }
    found = {name: measure(tokens, arguments.quick, **settings) for name, settings in sides.items()}
    for name, point in found.items():
        for what in ("loss", "gradient"):
            theirs = found["Transformers"][what]
            assert math.isclose(point[what], theirs, rel_tol=1e-5), f"{name}: {what} {point[what]} against {theirs}"
    best = {"side": "ours", "activations": OURS[BEST], "windows": WINDOWED}
    growth = {length: measure(length, arguments.quick, **best) for length in lengths}
    per_token = [point["kib_per_token"] for point in growth.values()]
    theirs = found["Transformers, checkpointed"]["peak"]
    result = {
        "tokens": tokens,
        "sides": found,
        "times_less_than_checkpointed": {name: round(theirs / found[name]["peak"], 2) for name in ours},
        "growth": {str(length): point for length, point in growth.items()},
        "flat": round(max(per_token) / min(per_token), 3),
        "bars": {"times_less": BAR, "flat": BAR_FLAT},
        "machine": machine(),
        "versions": versions("torch", "transformers", "mmctx"),
    }
    lines = [
        f"{name:<28} {point['kib_per_token']:8.1f} KiB a token (resident {point['resident_kib_per_token']:.1f}), "
        f"{theirs / point['peak']:.1f}x less than checkpointed Transformers"
        for name, point in found.items()
    ]
    lines += [f"{length:>7} tokens, {BEST}: {point['kib_per_token']} KiB a token" for length, point in growth.items()]
    report(result, [*lines, f"most over least: {result['flat']}; bars {BAR}x and {BAR_FLAT}"], arguments.json)


if __name__ == "__main__":
    main()
