"""The memory that a step takes by estimate, against what autograd really keeps on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import words, write_shard
from torch import Tensor

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch
from mmctx.train.config import RunConfig
from mmctx.train.memory import estimate_memory
from mmctx.train.optim import build_optimizer


def open_run(tree: dict[str, Any]) -> tuple[RunConfig, MmctxModel, PackedBatch]:
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    plan = Plan(config.data, data.tables, config.train.seed)
    torch.manual_seed(0)
    model = MmctxModel(config.model, config.objectives, len(data.tokenizer)).train()
    return config, model, data.dataset[max(plan.step(0), key=lambda bin: bin.tokens)]


def measured_activations(model: MmctxModel, batch: PackedBatch) -> int:
    """Bytes of the different storages that a real forward pass saves, those of parameters and buffers apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []  # all at once, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del losses
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.0}, {"checkpoint_activations": True}])
def test_activations_are_what_autograd_keeps(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    tree["model"]["transformer"] |= {"num_kv_heads": None} | changes
    config, model, batch = open_run(tree)
    estimate = estimate_memory(config, batch, model.vocab_size)
    assert estimate["activations"] == pytest.approx(measured_activations(model, batch), rel=0.01)


def test_with_sequence_parallel_it_is_the_share_of_one_process(tree: dict[str, Any]) -> None:
    """What is shared out falls to less than two thirds, embeddings that are compared and slots of key heads included."""
    config, model, batch = open_run(tree)
    shared = config.model_copy(update={"train": config.train.model_copy(update={"sequence_parallel": 2})})
    whole, part = (estimate_memory(c, batch, model.vocab_size) for c in (config, shared))
    assert whole["activations"] / 2 < part["activations"] < whole["activations"] * 2 / 3
    assert part["weights"] == whole["weights"]


def test_grouped_heads_are_repeated_where_a_mask_is_needed(tree: dict[str, Any]) -> None:
    """As PyTorch's attention does on a GPU and not on a CPU: the estimate is a little on the safe side."""
    config, model, batch = open_run(tree)
    measured = measured_activations(model, batch)
    assert measured < estimate_memory(config, batch, model.vocab_size)["activations"] < 1.06 * measured


def test_long_documents_are_attended_to_by_a_kernel_that_keeps_no_scores(tree: dict[str, Any], tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [{"__key__": f"{n}", "txt": words(n, 1000).encode()} for n in range(2)])
    tree["data"]["sources"] = {"s": {"shards": str(tmp_path / "s.tar"), "objectives": ["captioning"]}}
    tree["data"] |= {"context_length": 2000, "bin_tokens": 2000, "window_steps": 1}
    tree["model"] |= {"image": None, "audio": None}
    config, model, batch = open_run(tree)
    assert max(batch.layout.lengths) > 1000
    estimate = estimate_memory(config, batch, model.vocab_size)
    assert estimate["activations"] == pytest.approx(measured_activations(model, batch), rel=0.01)


def test_the_total_is_the_sum_of_what_a_process_holds(tree: dict[str, Any]) -> None:
    config, model, batch = open_run(tree)
    found = estimate_memory(config, batch, model.vocab_size)
    assert found["total"] == sum(size for name, size in found.items() if name != "total")
    optimizer = build_optimizer(model, config.train.optimizer)
    losses = model(batch)
    torch.stack([loss.total for loss in losses.values()]).sum().backward()
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert (found["weights"], found["gradients"], found["optimizer"]) == (weights, gradients, moments)
