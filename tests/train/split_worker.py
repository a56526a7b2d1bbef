"""One rank of `test_exact_split.py`, and the global steps that it and the single process both compute.

    torchrun --nproc-per-node 4 tests/train/split_worker.py TREE.json OUT.pt

However the same documents are dealt out to micro-batches and ranks, the sums of losses and the gradients have to be the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.parallel.mesh import Mesh
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.step import GradientStep, MicroBatch
from mmctx.train.sums import Sums

ACCUMULATIONS = (1, 2, 4)
SAMPLES = 12
"""Triples in a global step; with 16 bins, some have none."""


def build(tree: dict[str, Any]) -> tuple[MmctxModel, RunData, RunConfig]:
    """The model in double precision, in training mode, without dropout, with every objective; and the data."""
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    return build_model(config, len(data.tokenizer)).double().train(), data, config


def deal(data: RunData, objective: str, count: int) -> list[PackedBatch]:
    """The documents of 12 triples and 4 books in so many bins. The views of a sample are torn apart, and one sample is drawn twice."""
    documents: list[Document] = [d for s in [*range(SAMPLES), 3] for d in data.dataset.documents(0, s, 0)]
    documents += [d for sample in range(4) for d in data.dataset.documents(1, sample, 0)]
    wanted = [d for d in documents if objective in ("all", d.objective)]
    bins: list[list[Document]] = [[] for _ in range(count)]
    for number, document in enumerate(wanted):
        bins[(5 * number + number // 7) % max(1, count - 1)].append(document)  # of several, the last one stays empty
    return [pack_documents(bin or [data.dataset._nothing()], data.tokenizer.placeholder_ids) for bin in bins]


def compute(
    accelerator: Accelerator,
    built: tuple[MmctxModel, RunData, RunConfig],
    wrapped: torch.nn.Module,
    case: str,
    accumulation: int,
) -> dict[str, torch.Tensor]:
    """Losses, gradients and negatives of one global step over all ranks."""
    model, data, config = built
    rank, size = accelerator.process_index, accelerator.num_processes
    numbers = range(accumulation * size)[rank::size]
    bins = [deal(data, case, accumulation * size)[number] for number in numbers]
    sums = Sums(accelerator, Mesh(data_rank=rank, data_size=size))
    model.zero_grad()
    muster = sums.muster(model, numbers, bins, bins)
    weights = {name: objective.weight for name, objective in config.objectives.items()}
    totals = GradientStep(accelerator, wrapped, model, weights)([MicroBatch(0, batch) for batch in bins], muster)
    names = sorted(totals)
    shared = sums.of_losses(torch.stack([totals[name].double() for name in names]))
    found = {
        f"loss/{name}": torch.tensor(total, dtype=torch.float64) for name, total in zip(names, shared, strict=True)
    }
    found |= {f"count/{name}": torch.tensor(count) for name, count in muster.counts.items()}
    found |= {f"negatives/{name}": torch.tensor(count) for name, count in muster.negatives.items()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: DDP would hang"
        found[name] = parameter.grad.clone()
    return found


def everything(tree: dict[str, Any], accumulations: tuple[int, ...]) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """Each objective alone and all of them, split into so many micro-batches a rank."""
    accelerator = Accelerator(cpu=True)
    built = build(tree)
    wrapped = accelerator.prepare(built[0])
    cases = [*built[2].objectives, "all"]
    return {(case, n): compute(accelerator, built, wrapped, case, n) for case in cases for n in accumulations}


def main(tree: str, out: str) -> None:
    """All splits on as many ranks as there are; rank 0 writes what it found, and all ranks must have found the same."""
    torch.set_num_threads(1)
    found = everything(json.loads(Path(tree).read_text()), ACCUMULATIONS)
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
