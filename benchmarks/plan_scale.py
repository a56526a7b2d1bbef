"""Planning at scale: a simulated index of 10^9 samples, and the speed and evenness of packing.

    python benchmarks/plan_scale.py [--json] [--quick]

The index is real: sparse memory-mapped arrays of 10,000 shards of 100,000 samples, with sizes written only where the plan looks. Bars: step
10^7 in under 2 s and under 300 MB resident beyond the imports. Speed is measured on an index of 10^6 samples in 100 shards, whose arrays
stay open: at least 200,000 samples/s on one core; fill at least 0.985 and cost imbalance between 8 ranks at most 1.05 at context 4,096 on
lognormal(5.5, 0.9) lengths, and the same fill on the demo's picture books where `make demo` has built them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from mmctx.datasets.config import DataConfig
from mmctx.datasets.planning.plan import Plan, share_out
from mmctx.datasets.planning.table import Preprocessors, SourceTable
from mmctx.datasets.shards.measure import MEDIA_DTYPE, SAMPLE_DTYPE
from mmctx.datasets.shards.sidecar import ShardIndex
from mmctx.datasets.shards.source import Source
from mmctx.flops import Work
from mmctx.objectives.captioning import Captioning, CaptioningConfig

RANKS = 8


def write_index(folder: Path, num_shards: int, shard_size: int) -> list[ShardIndex]:
    """Sidecars without tars; token counts are lognormal, repeated from one block of the disk by hard links."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(5.5, 0.9, (shard_size, 1)), 16, 2048).astype(np.int32)
    first = folder / "shard-00000.tar.index"
    first.mkdir()
    open_memmap(first / "samples.npy", "w+", SAMPLE_DTYPE, (shard_size,))  # sparse: zeros take no room
    open_memmap(first / "keys.npy", "w+", np.dtype("S16"), (shard_size,))
    np.save(first / "media.npy", np.zeros(0, MEDIA_DTYPE))
    np.save(first / "tokens-x.npy", tokens)
    shards = []
    for number in range(num_shards):
        path = folder / f"shard-{number:05d}.tar"
        if number:
            index = folder / f"{path.name}.index"
            index.mkdir()
            for file in first.iterdir():
                (index / file.name).hardlink_to(file)
        shards.append(ShardIndex(path, shard_size, f"{number:032x}", "tokens-x.npy"))
    return shards


def make_plan(shards: list[ShardIndex]) -> Plan:
    """Captioning of plain texts by a model of 1 B parameters."""
    config = DataConfig.model_validate(
        {
            "tokenizer": "none",
            "sources": {"texts": {"shards": "none", "objectives": ["captioning"]}},
            "context_length": 4096,
            "bin_tokens": 4096,
            "bins_per_step": RANKS,
        }
    )
    nothing = Preprocessors(None, None, lambda a, b: 0 * a, lambda a, b: 0 * a)
    work = Work(6 * 10**9, 6 * 32_000 * 2048, 0, 0, (None,) * 16, 2048)
    tokenizer: Any = SimpleNamespace(begin=())  # all that sizes ask of one
    halves = {"captioning": Captioning("captioning", CaptioningConfig(), tokenizer)}
    table = SourceTable(Source("texts", shards, ("txt",)), config.sources["texts"], nothing, halves, work, config)
    return Plan(config, {"texts": table}, seed=0)


def books_fill() -> float | None:
    """Fill at context 4,096 on the demo's interleaved picture books, None where they are not built."""
    if not list(Path("data/emoji/books").glob("*.tar")):
        return None
    from mmctx import api

    sizes = ["data.context_length=4096", "data.bin_tokens=4096", "data.window_steps=null"]
    config = api.load_config("configs/demo.yaml", *sizes)
    books = {"books": config.data.sources["books"].model_copy(update={"weight": None})}
    data = config.data.model_copy(update={"sources": books})
    plan = Plan(data, api.build_dataset(config.model_copy(update={"data": data})).tables, seed=0)
    bins = [bin for step in range(4 * plan.window_steps) for bin in plan.step(step)]
    return sum(bin.tokens for bin in bins) / len(bins) / 4096


def resident_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a thousandth of the size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards = write_index(Path(name), *((100, 10_000) if arguments.quick else (10_000, 100_000)))
        before = resident_mib()
        started = time.perf_counter()
        plan = make_plan(shards)
        plan.step(10**7)
        seek, memory, samples = time.perf_counter() - started, resident_mib() - before, plan.num_samples
    with tempfile.TemporaryDirectory() as name:
        plan = make_plan(write_index(Path(name), 100, 10_000))
        plan.step(0)  # opens the arrays
        rates, steps = [], []
        for number in range(1, 9):
            started = time.perf_counter()
            plan.step(number * plan.window_steps)
            rates.append(plan.samples_per_window / (time.perf_counter() - started))
            steps += [plan.step(number * plan.window_steps + place) for place in range(plan.window_steps)]
        rate = max(rates)
    bins = [bin for step in steps for bin in step]
    costs = [[sum(bin.cost for _, bin in share_out(step, rank, RANKS)) for rank in range(RANKS)] for step in steps]
    result = {
        "samples": samples,
        "window": {"steps": plan.window_steps, "samples": plan.samples_per_window},
        "seek_seconds": round(seek, 3),
        "resident_mib": round(memory, 1),
        "total_resident_mib": round(resident_mib(), 1),
        "samples_per_second": round(rate),
        "fill": round(sum(bin.tokens for bin in bins) / len(bins) / plan.config.bin_tokens, 4),
        "largest_bin": max(bin.tokens for bin in bins),
        "imbalance": round(max(max(cost) * RANKS / sum(cost) for cost in costs), 4),
        "books_fill": None if (books := books_fill()) is None else round(books, 4),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['samples']:,} samples, window of {plan.window_steps} steps, {plan.samples_per_window:,} samples")
    print(
        f"plan(step=10^7)    {seek:.2f} s (bar 2), {memory:.0f} MiB resident (bar 300), {resident_mib():.0f} with all imports"
    )
    print(f"planning           {rate:,.0f} samples/s (bar 200,000)")
    print(
        f"fill               {result['fill']:.4f} (bar 0.985), largest bin {result['largest_bin']} of {plan.config.bin_tokens}"
    )
    print(f"imbalance, 8 ranks {result['imbalance']:.4f} (bar 1.05)")
    print(f"fill, emoji books  {'not built: run `make demo`' if books is None else f'{books:.4f} (bar 0.985)'}")


if __name__ == "__main__":
    main()
