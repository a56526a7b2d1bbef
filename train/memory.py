"""How much memory a training step will take, by running it on the meta device: model, activation settings, the largest planned bin."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch
from mmctx.parallel.shard import shard_batch
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import without_pretrained
from mmctx.train.config import RunConfig
from mmctx.train.optim.modules import freeze
from mmctx.train.optim.optimizer import state_shapes
from mmctx.train.storage_trace import FusedAttention, StorageTrace


def estimate_memory(config: RunConfig, batch: PackedBatch, vocab_size: int) -> dict[str, Any]:
    """Bytes that one process holds at the worst moment of a step over `batch`, by what they are for, and when that moment is.

    The step is a later one: the optimizer's moments exist, and gradients too if the process takes several bins a step. The batches of a
    step and of the one before it are counted as large as this one. Not counted are the libraries themselves, what kernels allocate inside,
    data loaders, and DDP's buckets, which take the gradients' size once more. With sequence parallel, activations are those of one
    process's part.

    Returns:
        `weights`, `gradients`, `optimizer`, `ema`, `batches`, then activations by the module that they belong to (`image`, `audio`,
        `trunk`, `objectives`, `embedding`), `total`, and `peak_at`.
    """
    shape = config.model_copy(update={"model": without_pretrained(config.model)})
    trace = StorageTrace()
    with torch.device("meta"):
        model = build_model(shape, vocab_size).train()
    freeze(model, config.train.modules)
    trained = [p for p in model.parameters() if p.requires_grad]
    _follow(model, trace)
    with FusedAttention(), trace:
        moments = [torch.empty(shape, device="meta") for shape in state_shapes(model, config.train.optimizer)]
        average = [torch.empty_like(p) for p in model.parameters()] if config.train.ema else []
        kept = {"weights": model.state_dict().values(), "optimizer": moments, "ema": average}
        for part, tensors in kept.items():
            _count(trace, tensors, part)
        trace.part = "batches"
        batches = [batch.to("meta") for _ in range(2 * config.data.bins_per_step)]
        if config.data.bins_per_step > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                trace.count(parameter.grad, "gradients")
        trace.part, trace.place = "embedding", "forward"
        size = config.train.sequence_parallel
        losses = model.losses(shard_batch(batch, 0, size, group=None).to("meta") if size > 1 else batches[0])
        total = torch.stack([loss.total for loss in losses.values()]).sum()
        del losses
        trace.place = "backward"
        # From an edge of the graph: with a tensor the whole backward would run outside of FusedAttention, as functions that it sees do.
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(total), torch.ones_like(total))
    parts = {part: size for part, size in trace.at_peak.items() if size}
    return parts | {"total": trace.peak, "peak_at": trace.peak_at}


def _count(trace: StorageTrace, tensors: Iterable[Tensor], part: str) -> None:
    for tensor in tensors:
        trace.count(tensor, part)


def _follow(model: MmctxModel, trace: StorageTrace) -> None:
    """Has the trace know where the step is: when a module of interest runs, and when its backward does."""
    modules: dict[str, tuple[str, nn.Module]] = {
        **{f"{kind} encoder": (kind, encoder) for kind, encoder in model.encoders.items()},
        **{f"block {number}": ("trunk", block) for number, block in enumerate(model.trunk.blocks)},
        "final norm": ("trunk", model.trunk.norm),
        **{f"loss of {name}": ("objectives", objective) for name, objective in model.objectives.items()},
    }
    for name, (part, module) in modules.items():
        module.register_forward_pre_hook(partial(_enter, trace, part, name))
        module.register_forward_hook(partial(_leave, trace, part, name), always_call=True)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: trace.count(p.grad, "gradients"))  # type: ignore[arg-type]


def _enter(trace: StorageTrace, part: str, name: str, module: nn.Module, args: Any) -> None:
    trace.part, trace.place = part, f"forward of {name}"


def _leave(trace: StorageTrace, part: str, name: str, module: nn.Module, args: Any, output: Any) -> None:
    tensor = output if isinstance(output, Tensor) else getattr(output, "total", None)
    if tensor is not None and tensor.requires_grad:
        tensor.register_hook(partial(_turn, trace, part, name))
    trace.part, trace.place = "embedding", "forward"


def _turn(trace: StorageTrace, part: str, name: str, gradient: Tensor) -> None:
    """The gradient of a module's output is there: its backward begins."""
    trace.part, trace.place = part, f"backward of {name}"
