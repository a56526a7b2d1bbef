"""What a run will read, before it runs: what `mmctx plan` prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.config import DataConfig
from mmctx.datasets.plan import Plan

TRIAL_STEPS = 64


def forecast(config: DataConfig, data: RunData, steps: int, seed: int) -> dict[str, Any]:
    """Samples, tokens, epochs and fill of a run of `steps` steps; fill and evenness are measured on its first steps."""
    plan = Plan(config, data.tables, seed)
    trial = [plan.step(step) for step in range(min(steps, TRIAL_STEPS))]
    bins = [bin for step in trial for bin in step]
    tokens, costs = np.array([b.tokens for b in bins]), np.array([b.cost for b in bins])
    drawn = Counter(plan.names[source] for b in bins for source, _, _ in b.samples)
    samples = plan.samples_per_step * steps
    return {
        "steps": steps,
        "samples": {name: int(count / len(trial) * steps) for name, count in sorted(drawn.items())},
        "tokens": int(tokens.sum() / len(trial) * steps),
        "epochs": samples / plan.num_samples,
        "usable_samples": {name: len(table.ids) for name, table in data.tables.items()},
        "left_out": dict(Counter(skip.reason for skip in data.skips)),
        "samples_per_step": plan.samples_per_step,
        "tokens_per_bin": {"mean": float(tokens.mean()), "max": int(tokens.max()), "bin_tokens": config.bin_tokens},
        "fill": float(tokens.mean() / config.bin_tokens),
        "cost_imbalance": float(costs.max() / costs.mean()),
    }
