"""One rank of `test_distribution.py`, and the steps that it and the single process both take.

torchrun --nproc-per-node 4 tests/train/distribution_worker.py TREE.json OUT.pt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.parallel.mesh import build_mesh
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.distribution import clip_gradients, distribute, is_sharded
from mmctx.train.optim import build_optimizer
from mmctx.train.step import GradientStep, MicroBatch
from mmctx.train.sums import Sums

BINS = 4
"""Of a global step: 1, 2 and 4 processes share them."""


class Case(NamedTuple):
    """A stretch of training."""

    steps: int
    train: dict[str, Any]
    sequence: int = 1


CASES = {
    "ddp": Case(200, {}),
    "fsdp2": Case(200, {"distribution": {"kind": "fsdp2"}}),
    "fsdp2, recomputed in chunks": Case(
        5, {"distribution": {"kind": "fsdp2"}, "activations": {"checkpoint": "full", "media_chunk": 1, "mlp_tile": 16}}
    ),
    "fsdp2, kept": Case(5, {"distribution": {"kind": "fsdp2", "reshard_after_forward": False}}),
    "fsdp2, sequence parallel": Case(5, {"distribution": {"kind": "fsdp2"}}, 2),
    "fsdp2, muon": Case(5, {"distribution": {"kind": "fsdp2"}, "optimizer": {"kind": "muon"}}),
    "fsdp2, bf16": Case(5, {"distribution": {"kind": "fsdp2"}, "precision": "bf16"}),
}


def random_steps(data: RunData, count: int) -> list[list[PackedBatch]]:
    """Global steps whose bins lack modalities, or everything, at random."""
    pool: dict[str, list[Document]] = {"image": [], "audio": [], "text": []}
    for source, samples in ((0, 4), (1, 12)):
        for sample in range(samples):
            for document in data.dataset.documents(source, sample, 0):
                kinds = {item.kind for _, item in document.media}
                for kind in kinds or {"text"}:
                    pool[kind].append(document)
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(count):
        bins = []
        for _ in range(BINS):
            wanted = [kind for kind in pool if rng.random() < 0.4]  # none at all once in five
            documents = [pool[kind][rng.integers(len(pool[kind]))] for kind in wanted for _ in range(2)]
            bins.append(pack_documents(documents or [data.dataset._nothing()], data.tokenizer.placeholder_ids))
        steps.append(bins)
    return steps


def losses(tree: dict[str, Any], case: Case) -> torch.Tensor:
    """(steps, objectives + 1): each objective's loss, and the norm of the gradient, over all ranks."""
    tree = json.loads(json.dumps(tree))
    tree["train"] |= case.train
    config = build_config(RunConfig, tree, "tree")
    rough = config.train.precision == "bf16"
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if rough else "no")
    rank, size = accelerator.process_index, accelerator.num_processes
    mesh = build_mesh("cpu", rank, size, case.sequence if size > 1 else 1)
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer)).train()
    model = model if rough else model.double()
    wrapped = distribute(model, config.train.distribution, accelerator)
    assert is_sharded(model) == (size > 1 and config.train.distribution.kind == "fsdp2")
    optimizer = build_optimizer(model, config.train.optimizer)
    sums = Sums(accelerator, mesh)
    weights = {name: objective.weight for name, objective in config.objectives.items()}
    gradient_step = GradientStep(accelerator, wrapped, model, weights)
    found = []
    for step, bins in enumerate(random_steps(data, case.steps)):
        whole = bins[mesh.data_rank :: mesh.data_size]
        parts = [mesh.shard(batch) for batch in whole]
        numbers = range(mesh.data_rank, BINS, mesh.data_size)
        muster = sums.muster(model, numbers, whole, parts)
        micro_batches = [MicroBatch(step * BINS + n, part) for n, part in zip(numbers, parts, strict=True)]
        totals = gradient_step(micro_batches, muster)
        norm = clip_gradients(wrapped, accelerator, config.train.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        shared = sums.of_losses(torch.stack([totals[name].double() for name in sorted(totals)]))
        means = [total / max(muster.counts[name], 1) for name, total in zip(sorted(totals), shared, strict=True)]
        found.append([*means, float(norm)])
    AcceleratorState._reset_state()
    return torch.tensor(found, dtype=torch.float64)


def main(tree: str, out: str) -> None:
    """All cases, one after the other; rank 0 writes what it found."""
    torch.set_num_threads(1)
    found = {name: losses(json.loads(Path(tree).read_text()), case) for name, case in CASES.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
