"""A layer with a memory against one with full attention: time and memory of a training step at 8k, 32k and 64k tokens, and their growth.

    python benchmarks/memory_attention.py [--json] [--quick]

One document, float32, two blocks of 128 channels and two heads; the first has a window of 512 on all sides, the second sees everything
("full attention") or a window of 512 and the 32 most similar keys beyond it. "All": every key of the past can be found. "16k": the newest
16,384. Searched by plain torch and by faiss; both are exact. Each point is a fresh process that takes one step, forward and backward, with
selective checkpointing; memory is how much its largest resident size grew over what it held before. "Growth" is the exponent of time in the
number of tokens, between the last two lengths: 1 is linear, 2 square.
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

SIDE = Path(__file__).parent / "sides" / "memory_attention_side.py"
TRUNK = {"width": 128, "depth": 2, "num_heads": 2, "mlp_width": 256}
WINDOW, TOP_K, BOUND = 512, 32, 16384


def sides(window: int, bound: int) -> dict[str, dict[str, Any]]:
    """Trunks by name."""
    memory = {"layers": [1], "top_k": TOP_K}
    own = {"windows": [window]}
    return {
        "full attention": {"windows": [window, None]},
        "windows alone": own,
        "memory, all": own | {"memory": memory | {"tokens": 1 << 30}},
        "memory, all, faiss": own | {"memory": memory | {"tokens": 1 << 30, "search": "faiss"}},
        "memory, 16k": own | {"memory": memory | {"tokens": bound}},
    }


def measure(tokens: int, trunk: dict[str, Any]) -> dict[str, float]:
    """One point in its process."""
    settings = {"tokens": tokens, "vocab": 512, "threads": 1, "trunk": TRUNK | trunk}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SIDE), json.dumps(settings)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{settings}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{tokens} tokens, {trunk}: {found}", file=sys.stderr, flush=True)
    return found


def growth(points: dict[int, dict[str, float]], what: str) -> float:
    """Exponent of the last stretch."""
    (a, before), (b, after) = list(points.items())[-2:]
    return round(math.log(max(after[what], 1e-9) / max(before[what], 1e-9)) / math.log(b / a), 2)


def main() -> None:
    arguments = parse(__doc__, repeats=1)
    lengths = [256, 512] if arguments.quick else [8192, 32768, 65536]
    trunks = sides(64, 128) if arguments.quick else sides(WINDOW, BOUND)
    found = {name: {tokens: measure(tokens, trunk) for tokens in lengths} for name, trunk in trunks.items()}
    grows = {name: {what: growth(points, what) for what in ("processor", "peak_mib")} for name, points in found.items()}
    lines = []
    for name, points in found.items():
        for tokens, point in points.items():
            full = found["full attention"][tokens]
            lines.append(
                f"{name:<20} {tokens:>6} tokens: {point['processor']:8.2f} s ({point['processor'] / full['processor']:.2f} of full), "
                f"{point['peak_mib']:8.1f} MiB ({point['peak_mib'] / full['peak_mib']:.2f}), {point['gflops']:.0f} GFLOP"
            )
        lines.append(
            f"{name:<20} grows as tokens to the power of {grows[name]['processor']} in time, {grows[name]['peak_mib']} in memory"
        )
    result = {
        "lengths": lengths,
        "sides": {name: {str(tokens): point for tokens, point in points.items()} for name, points in found.items()},
        "growth": grows,
        "machine": machine(),
        "versions": versions("torch", "faiss-cpu", "mmctx"),
    }
    report(result, lines, arguments.json)


if __name__ == "__main__":
    main()
