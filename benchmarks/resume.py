"""Resuming at batch k (bar C6): ours starts its sampler there, accelerate's `skip_first_batches` reads and drops what came before.

    python benchmarks/resume.py [--json] [--quick] [--repeats 2]

Each time is a fresh process without its imports, in two stretches. "build" is the same at any k: tokenizer, indexes, sizes. "seek" is what
k could change: the plan, the loader, the first batch. k = 0 is the cold first batch. accelerate skips over a DataLoader of webdataset with
open_clip's transform; 100,000 batches are not skipped but extrapolated from the two that are.

It is asserted that the resumed batch is, bit for bit (token ids, labels, positions, pixels), the one that a reader who was never
interrupted gets. For 100,000 that reader starts ten batches earlier.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, parse, report, run_peer, versions, write_photos

SIDES = Path(__file__).parent / "sides"
BAR = 1.5
"""Our seconds at any k over those of a cold first batch."""


def check_equal(folder: Path, batch_size: int, steps: list[int]) -> None:
    """The batches at `steps`, as processes that resumed there left them, against a reader that walks there."""
    import torch
    from our_side import build, loader_from
    from resume_side import tensors

    data = build(folder, batch_size)
    last = steps[-1]
    walked = {k: batch for k, batch in enumerate(itertools.islice(loader_from(data), steps[-2] + 1)) if k in steps}
    walked[last] = next(itertools.islice(loader_from(data, last - 10), 10, None))
    for k, batch in walked.items():
        resumed = torch.load(folder / f"{k}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), resumed, strict=True)), f"batch {k} differs"


def resume(side: str, folder: Path, batch_size: int, k: int) -> dict[str, Any]:
    arguments = [side, str(folder), str(batch_size), str(k), str(folder / f"{k}.pt")]
    return run_peer(Path(sys.executable), SIDES / "resume_side.py", *arguments)


def main() -> None:
    arguments = parse(__doc__, repeats=2)
    sys.path.insert(0, str(SIDES))
    from image_text import write_tokenizer

    samples, batch, steps = (64, 4, [2, 5, 1_000]) if arguments.quick else (1_024, 8, [20, 200, 100_000])
    runs = [("ours", k) for k in (0, *steps)] + [("accelerate", k) for k in (0, *steps[:-1])]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, samples, shards=4, different=100)
        write_tokenizer(folder / "tokenizer")
        for turn in range(arguments.repeats):
            for side, k in runs:
                if side == "ours" or turn == 0 or k < steps[1]:  # the long skip once: it is no close race
                    found[side, k].append(resume(side, folder, batch, k))
        check_equal(folder, batch, steps)

    def best(side: str, k: int, *stretches: str, by: str = "clock") -> float:
        return min(sum(turn[name][by] for name in stretches) for turn in found[side, k])

    seconds = {f"{side} {k}": round(best(side, k, "build", "seek"), 3) for side, k in runs}
    low, high = steps[:2]
    each = (best("accelerate", high, "seek") - best("accelerate", low, "seek")) / (high - low)
    seconds[f"accelerate {steps[-1]} (extrapolated)"] = round(best("accelerate", high, "seek") + each * steps[-1], 1)
    over_cold = {
        by: {
            what: {str(k): round(best("ours", k, *names, by=by) / best("ours", 0, *names, by=by), 3) for k in steps}
            for what, names in (("seek", ["seek"]), ("build and seek", ["build", "seek"]))
        }
        for by in ("clock", "processor")
    }
    result = {
        "seconds": seconds,
        "seek_seconds": {f"{side} {k}": round(best(side, k, "seek"), 3) for side, k in runs},
        "ours_over_cold": over_cold,
        "bit_identical": True,
        "bar": BAR,
        "machine": machine(),
        "versions": versions("accelerate", "webdataset", "open_clip_torch", "torch", "mmctx"),
    }
    lines = ["resumed batches equal the uninterrupted reader's, bit for bit"]
    lines += [f"{name:<32} {value:9.2f} s to the next batch" for name, value in seconds.items()]
    lines.append(f"of these seek: {result['seek_seconds']}")
    for by, ratios in over_cold.items():
        lines += [f"ours over a cold first batch, by the {by}, {what}: {ratio}" for what, ratio in ratios.items()]
    report(result, [*lines, f"bar {BAR}"], arguments.json)


if __name__ == "__main__":
    main()
