"""Trains on one document in a process of its own and prints what it took: `long_document_side.py CONFIG`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import timm  # noqa: F401  # imported ahead, so that libraries are not counted as the run's memory

import mmctx
from mmctx.datasets.planning.plan import Plan
from mmctx.flops import estimate_work
from mmctx.jsonl import read_lines
from mmctx.model import count_parameters
from mmctx.train.build import build_model
from mmctx.train.memory import estimate_memory


def resident() -> int:
    """Bytes of this process in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    config = mmctx.load_config(sys.argv[1])
    data = mmctx.build_dataset(config)
    bin = Plan(config.data, data.tables, config.train.seed).step(0)[0]
    batch = data.dataset[bin]
    vocab_size = len(data.tokenizer)
    started = time.perf_counter()
    estimate = estimate_memory(config, batch, vocab_size)
    answer = {
        "tokens": batch.num_tokens,
        "documents": len(batch.layout.lengths),
        "pictures": len(batch.media["image"].lengths),
        "clips": len(batch.media["audio"].lengths),
        "parameters": count_parameters(build_model(config, vocab_size)),
        "flops_per_step": bin.cost,
        "estimate": estimate,
        "estimate_seconds": round(time.perf_counter() - started, 1),
        "attention_flops": int(estimate_work(config.model, vocab_size).attention(batch.layout.lengths, True).sum()),
    }
    del batch, data
    before = resident()
    result = mmctx.train(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    losses = [line["loss"] for line in read_lines(result.run_dir / "metrics.jsonl")]
    answer |= {
        "resident_before": before,
        "resident_peak": peak,
        "losses": losses,
        "seconds_per_step": round(result.train_seconds / result.step, 1),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
