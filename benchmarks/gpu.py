"""What one GPU can do: attention certified and timed, a 1B model's speed (bar G1), the longest context (bar G2), padding against packing.

    python benchmarks/gpu.py [--out FOLDER] [--toy] [--only SECTION ...] [--json]

Nothing is downloaded. Each section is a process of its own with a budget of seconds, together under eight minutes: one that fails or hangs
loses nothing but its own rest, for every line is on the disk (`FOLDER/gpu.jsonl`) as soon as it is measured. `--toy` runs all of it at tiny
sizes on a CPU; what it measures there means nothing. The last section is no part of the default: a step over half a million tokens and more
takes minutes, for attention grows with the square.

Conventions: attention's TFLOP/s count the pairs that may see each other, 4 d FLOPs forward and 10 d backward for a pair and head, as in the
papers on FlashAttention. Model FLOPs are those of `mmctx.flops` (6 P T and attention's pairs, causal; nothing recomputed), utilisation
is against the dense bf16 peak of the data sheet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import machine, report, versions

sys.path.insert(0, str(Path(__file__).parent / "sides"))

BUDGETS = {
    "certificate": 50,
    "crossover": 50,
    "attention": 70,
    "training": 140,
    "longest": 100,
    "packing": 60,
    "longest_global": 590,
}
"""Seconds that each section may take, in running order: the next starts when it ends."""
DEFAULT = [name for name in BUDGETS if name != "longest_global"]
BARS = {
    "tokens_per_second": {8192: 45_000, 32_768: 28_000, 131_072: 10_000},
    "longest": {"without offload": 524_288, "with offload": 1_048_576},
}

Emit = Callable[..., None]


def write_line(path: Path, section: str, **values: Any) -> None:
    """Appends one result and sees to it that it survives."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"section": section, **values}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_here(section: str, path: Path, toy: bool) -> None:
    """One section, in this process."""
    import gpu_kernels
    import gpu_training

    sections: dict[str, Callable[[Emit, bool], None]] = {
        "certificate": gpu_kernels.certificate,
        "crossover": gpu_kernels.crossover,
        "attention": gpu_kernels.attention_speed,
        "training": gpu_training.training,
        "longest": gpu_training.longest,
        "packing": gpu_training.packing,
        "longest_global": gpu_training.longest_global,
    }
    sections[section](partial(write_line, path, section), toy)


def run_apart(section: str, folder: Path, toy: bool) -> None:
    """One section in a process of its own; how it ended, if not well, is a line too."""
    path, log = folder / "gpu.jsonl", folder / f"{section}.log"
    command = [sys.executable, __file__, "--section", section, "--out", str(folder), *(["--toy"] if toy else [])]
    started = time.perf_counter()
    with log.open("w") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=BUDGETS[section]).returncode
            ended = None if code == 0 else f"exit status {code}: {log.read_text().strip()[-800:]}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after its {BUDGETS[section]} s"
    about = {"error": ended} if ended else {}
    write_line(path, section, case="whole section", seconds=round(time.perf_counter() - started, 1), **about)


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines to read: one a result, failures with their reason."""
    lines = []
    for section in dict.fromkeys(result["section"] for result in results):
        lines.append(f"== {section}")
        for result in results:
            if result["section"] == section:
                values = {key: value for key, value in result.items() if key not in ("section", "case")}
                lines.append(f"  {result['case']:<40} " + "  ".join(f"{key} {value}" for key, value in values.items()))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, also on a CPU: shows that it runs")
    parser.add_argument("--only", nargs="+", choices=list(BUDGETS), default=DEFAULT)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="folder of results")
    parser.add_argument("--section", choices=list(BUDGETS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.jsonl"
    if arguments.section:
        run_here(arguments.section, path, arguments.toy)
        return
    import torch

    if not arguments.toy and not torch.cuda.is_available():
        report({"skipped": "no CUDA device"}, ["left out: no CUDA device; --toy shows that it runs"], arguments.json)
        return
    path.unlink(missing_ok=True)
    for section in arguments.only:
        run_apart(section, folder, arguments.toy)
        if not arguments.json:
            print(f"{section} done", flush=True)
    results = [json.loads(line) for line in path.read_text().splitlines()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "device": device,
        "results": results,
        "bars": BARS,
        "machine": machine(),
        "versions": versions("torch", "mmctx"),
    }
    report(result, [*table(results), f"device {device}, bars {BARS}"], arguments.json)


if __name__ == "__main__":
    main()
