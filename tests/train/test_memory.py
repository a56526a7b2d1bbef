"""The memory that a step takes by estimate, against what real steps take on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import words, write_shard

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.objectives import Roster
from mmctx.pack import PackedBatch
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.memory import estimate_memory
from mmctx.train.optim import build_optimizer
from mmctx.train.peak import measure_peak
from mmctx.train.step import GradientStep, MicroBatch
from mmctx.train.sums import Muster

BESIDES = ("total", "peak_at", "host_copies")

POLICIES = [
    {},
    {"checkpoint": "full"},
    {"checkpoint": "full", "every": 2, "media_chunk": 2},
    {"checkpoint": "selective", "mlp_tile": 128},
    {"mlp_tile": 100, "media_chunk": 1},
]

TRAIN = """
import json, sys
from pathlib import Path
import timm, transformers
import mmctx
from mmctx.datasets.planning.plan import Plan
from mmctx.train.memory import estimate_memory
config = mmctx.load_config(sys.argv[1])
data = mmctx.build_dataset(config)
batch = data.dataset[Plan(config.data, data.tables, config.train.seed).step(0)[0]]
estimate = estimate_memory(config, batch, len(data.tokenizer))
del data
def size(name):  # not ru_maxrss, which starts from the size of the process that called this one
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))
before = size("VmRSS")
mmctx.train(config)
peak = size("VmHWM")
print(json.dumps({"estimate": estimate["total"] + estimate["host_copies"], "resident": (peak - before) * 1024}))
"""


def open_run(tree: dict[str, Any]) -> tuple[RunConfig, PackedBatch, int]:
    """Config, the largest bin of the first step, vocabulary."""
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    plan = Plan(config.data, data.tables, config.train.seed)
    return config, data.dataset[max(plan.step(0), key=lambda bin: bin.tokens)], len(data.tokenizer)


def measure_step(config: RunConfig, batch: PackedBatch, vocab_size: int) -> int:
    """Bytes at the worst moment of the second step, beyond weights, moments and batches."""
    model = build_model(config, vocab_size).train()
    optimizer = build_optimizer(model, config.train.optimizer)
    accelerator = Accelerator(cpu=True)
    ones = dict.fromkeys(config.objectives, 1)
    batches = [
        replace(batch, pairs={view: tuple(id + (bin << 30) for id in ids) for view, ids in batch.pairs.items()})
        for bin in range(config.data.bins_per_step)
    ]
    gradient_step = GradientStep(accelerator, model, model, dict.fromkeys(ones, 1.0))
    muster = Muster(ones, ones, Roster.of(*batches))

    def step() -> None:
        gradient_step([MicroBatch(0, batch) for batch in batches], muster)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return measure_peak(step)


def estimated_step(estimate: dict[str, Any]) -> int:
    """The same, by estimate."""
    return estimate["total"] - sum(estimate[part] for part in ("weights", "optimizer", "batches"))


@pytest.mark.parametrize("activations", POLICIES, ids=str)
@pytest.mark.slow
def test_the_peak_is_foretold_for_every_policy(tree: dict[str, Any], activations: dict[str, Any]) -> None:
    tree["train"]["activations"] = activations
    tree["data"]["bins_per_step"] = 1 + len(activations) % 2
    tree["model"]["transformer"] |= {"width": 96, "mlp_width": 256, "depth": 3}
    config, batch, vocab_size = open_run(tree)
    assert set(batch.media) == {"image", "audio"}
    estimate = estimate_memory(config, batch, vocab_size)
    measured = measure_step(config, batch, vocab_size)
    assert estimated_step(estimate) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("activations", [{}, {"checkpoint": "full"}, {"checkpoint": "selective"}], ids=str)
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.slow
def test_a_long_document_is_foretold(
    tree: dict[str, Any], tmp_path: Path, activations: dict[str, Any], window: int | None
) -> None:
    write_shard(tmp_path / "s.tar", [{"__key__": f"{n}", "txt": words(n, 1900).encode()} for n in range(2)])
    tree["data"]["sources"] = {"s": {"shards": str(tmp_path / "s.tar"), "objectives": ["captioning"]}}
    tree["data"] |= {"context_length": 4000, "bin_tokens": 4000, "window_steps": 1, "bins_per_step": 1}
    tree["model"] |= {"image": None, "audio": None}
    tree["model"]["transformer"] |= {"windows": [window]}
    tree["train"]["activations"] = activations
    config, batch, vocab_size = open_run(tree)
    assert max(batch.layout.lengths) > 1800
    estimate = estimate_memory(config, batch, vocab_size)
    assert estimated_step(estimate) == pytest.approx(measure_step(config, batch, vocab_size), rel=0.15)


@pytest.mark.slow
def test_parts_make_the_total_and_the_peak_has_a_place(tree: dict[str, Any]) -> None:
    tree["data"]["bins_per_step"] = 2
    config, batch, vocab_size = open_run(tree)
    plain = estimate_memory(config, batch, vocab_size)
    assert plain["total"] == sum(size for part, size in plain.items() if part not in BESIDES)
    assert plain["peak_at"].startswith(("backward of", "forward of"))
    assert plain["objectives"] > 0
    weights = sum(p.nbytes for p in build_model(config, vocab_size).parameters())
    assert plain["gradients"] == weights
    assert plain["optimizer"] == 2 * weights
    assert plain["host_copies"] == plain["weights"] + plain["optimizer"]
    assert weights <= plain["weights"] < 1.01 * weights + 2**20  # buffers besides
    frugal = config.train.model_copy(
        update={"activations": config.train.activations.model_copy(update={"checkpoint": "full"})}
    )
    assert estimate_memory(config.model_copy(update={"train": frugal}), batch, vocab_size)["trunk"] < plain["trunk"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("activations", [{}, {"checkpoint": "selective", "mlp_tile": 512, "media_chunk": 4}], ids=str)
def test_a_process_that_trains_grows_as_foretold(
    tree: dict[str, Any], tmp_path: Path, activations: dict[str, Any]
) -> None:
    """Three steps of a run in a process of its own, each saved, by its resident size."""
    tree["data"] |= {"context_length": 2048, "bin_tokens": 2048, "window_steps": 1, "bins_per_step": 1}
    tree["model"]["transformer"] |= {"width": 384, "mlp_width": 1024, "depth": 8 if activations else 4}
    tree["train"] |= {"steps": 3, "save_every": 1, "activations": activations}
    tree["eval"] = {}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", TRAIN, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] == pytest.approx(found["estimate"], rel=0.15)


def test_with_sequence_parallel_it_is_the_share_of_one_process(tree: dict[str, Any]) -> None:
    """What is shared out falls to less than three quarters: rows on their way between ranks are there twice."""
    tree["data"]["bins_per_step"] = 1
    tree["model"]["transformer"]["dropout"] = 0.0  # masks are drawn for all tokens
    config, batch, vocab_size = open_run(tree)
    shared = config.model_copy(update={"train": config.train.model_copy(update={"sequence_parallel": 2})})
    whole, part = (estimate_memory(c, batch, vocab_size) for c in (config, shared))
    assert whole["trunk"] / 2 < part["trunk"] < whole["trunk"] * 0.75
    assert part["weights"] == whole["weights"]
