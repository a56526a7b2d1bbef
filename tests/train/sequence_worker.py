"""One rank of `test_sequence_parallel.py`, and the steps that it and the single process both compute.

    torchrun --nproc-per-node 4 tests/train/sequence_worker.py cpu TREE.json OUT.pt 2 4

The last arguments are sizes of sequence groups.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.parallel.mesh import Mesh, build_mesh
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

MODELS: dict[str, dict[str, Any]] = {
    "two key heads": {},
    "one key head, windows": {"num_kv_heads": 1, "windows": [None, 6], "dropout": 0.1},
    "twelve heads on three, recomputed": {
        "width": 48,
        "num_heads": 12,
        "num_kv_heads": 3,
        "head_dim": 4,
        "dropout": 0.1,
    },
    "as BERT": {
        "learned_positions": 128,
        "embedding_norm": True,
        "norm": "layer",
        "norm_place": "post",
        "activation": "gelu",
        "mlp_bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "head_transform": True,
    },
}
"""Changes of the tiny trunk, by name. With 3 key heads neither 2 nor 4 ranks divide them, nor they the ranks."""

ACTIVATIONS = {
    "two key heads": {"checkpoint": "selective", "mlp_tile": 16},
    "twelve heads on three, recomputed": {"checkpoint": "full"},
}
"""How their activations are kept, if not all."""


def build(tree: dict[str, Any], model: str, device: str) -> tuple[MmctxModel, RunData]:
    """The model, in training mode, and the data."""
    tree = json.loads(json.dumps(tree))
    tree["model"]["transformer"] |= {"dropout": 0.0} | MODELS[model]
    tree["train"]["activations"] = ACTIVATIONS.get(model, {})
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    return build_model(config, len(data.tokenizer)).to(device).train(), data


def steps(data: RunData) -> dict[str, list[PackedBatch]]:
    """Global steps of four bins each: what may go wrong when a bin is cut."""
    triples, books = (
        [d for sample in range(3) for d in data.dataset.documents(list(data.tables).index(source), sample, 0)]
        for source in ("triples", "books")
    )
    silent = [d for d in triples if not d.media]  # texts only: no rank has a picture or a clip
    one = next(d for d in triples if d.objective == "captioning" and d.media[0][1].kind == "image")
    longest = max(books, key=lambda d: len(d.input_ids))

    def pack(*documents: Document) -> PackedBatch:
        return pack_documents(documents, data.tokenizer.placeholder_ids)

    nothing = data.dataset._nothing()
    return {
        "all objectives": [pack(*triples[:8]), pack(*triples[8:], *books), pack(*books), pack(*triples)],
        "one document over all shards": [pack(longest), pack(one), pack(longest), pack(one)],
        "fewer tokens than ranks": [
            pack(nothing),
            pack(nothing, nothing),
            pack(nothing, nothing, nothing),
            pack(nothing),
        ],
        "no media": [pack(*silent), pack(*silent), pack(nothing), pack(*silent)],
        "media in some bins": [pack(*silent), pack(*triples), pack(one), pack(nothing)],
    }


def run_step(model: MmctxModel, bins: list[PackedBatch], precision: str, mesh: Mesh) -> dict[str, torch.Tensor]:
    """This rank's sums of losses, and of the gradients of their sum, over its part of its bins."""
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device
    for number in range(mesh.data_rank, len(bins), mesh.data_size):
        torch.manual_seed(number)  # as the loop does
        batch = bins[number]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = model.losses(mesh.shard(batch).to(device))
        torch.stack([loss.total for loss in losses.values()]).sum().backward()
        for name, loss in losses.items():
            found[f"loss/{name}"] = found.get(f"loss/{name}", 0) + loss.total.detach().double()
            found[f"count/{name}"] = found.get(f"count/{name}", 0) + torch.tensor(loss.count)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient on rank {mesh.sequence_rank}: DDP would hang"
        gradients[name] = parameter.grad.clone()
    return found | gradients


def everything(
    tree: dict[str, Any], mesh: Mesh, device: str = "cpu"
) -> dict[tuple[str, str, str], dict[str, torch.Tensor]]:
    """Every model, step and precision."""
    found = {}
    for name in MODELS:
        model, data = build(tree, name, device)
        for step, bins in steps(data).items():
            found[name, step, "fp64"] = run_step(model.double(), bins, "fp64", mesh)
    model, data = build(tree, "two key heads", device)
    for precision in ("fp32", "bf16"):
        found["two key heads", "all objectives", precision] = run_step(
            model, steps(data)["all objectives"], precision, mesh
        )
    return found


def main(device: str, tree: str, out: str, *sequence_sizes: str) -> None:
    """Sums over all ranks, for each size of the sequence groups; rank 0 writes them."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}[device])
    results = {}
    for size in map(int, sequence_sizes):
        mesh = build_mesh(device, dist.get_rank(), dist.get_world_size(), size)
        found = everything(json.loads(Path(tree).read_text()), mesh, device)
        for tensors in found.values():
            for name in tensors:
                tensors[name] = tensors[name].to(device)
                dist.all_reduce(tensors[name])
        results[f"{mesh.data_size}x{size}"] = found
        if device == "cuda":
            refuse_to_wait(json.loads(Path(tree).read_text()), mesh)
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def refuse_to_wait(tree: dict[str, Any], mesh: Mesh) -> None:
    """A step, the second of its kind, in which whatever waits for the device is an error."""
    model, data = build(tree, "two key heads", "cuda")
    bins = steps(data)["all objectives"]
    run_step(model, bins, "bf16", mesh)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run_step(model, bins, "bf16", mesh)
    torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    main(*sys.argv[1:])
