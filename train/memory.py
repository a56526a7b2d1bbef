"""How much memory a training step will take, by running it on the meta device: model, activation settings, the largest planned bin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmctx.model import MmctxModel
from mmctx.objectives import ComparingHalf, Roster
from mmctx.pack import PackedBatch
from mmctx.parallel.shard import shard_batch
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import without_origin
from mmctx.train.config import RunConfig
from mmctx.train.optim.modules import freeze, in_force
from mmctx.train.optim.optimizer import state_shapes
from mmctx.train.step import GradientStep, MicroBatch
from mmctx.train.storage_trace import FusedAttention, StorageTrace
from mmctx.train.sums import Muster
from mmctx.tuning import default_freezing


def estimate_memory(config: RunConfig, batch: PackedBatch, vocab_size: int) -> dict[str, Any]:
    """Bytes that one process holds at the worst moment of a step over `batch`, by what they are for, and when that moment is.

    The step is a later one: the optimizer's moments exist. The batches of a step and of the one before it are counted as large as this one;
    of several bins a step, two are run. Not counted are the libraries themselves, what kernels allocate inside, data loaders, and DDP's
    buckets, which take the gradients' size once more. With sequence parallel, activations are those of one process's part.

    Returns:
        `weights`, `gradients`, `optimizer`, `ema`, `batches`, then activations by the module that they belong to (`image`, `audio`,
        `trunk`, `objectives`, `embedding`), their sum `total`, and `peak_at`. Apart from these, `host_copies`: what the saver keeps in host
        memory from the first checkpoint on, to write it while training goes on. Without a GPU it takes the same memory as the rest.
    """
    shape = without_origin(config)
    trace = StorageTrace()
    with torch.device("meta"):
        model = build_model(shape, vocab_size).train()
    freeze(model, in_force(config.train.modules, default_freezing(model)))
    _follow(model, trace)
    with FusedAttention(), trace, torch.random.fork_rng(devices=[]):
        moments = [torch.empty(shape, device="meta") for shape in state_shapes(model, config.train.optimizer)]
        average = [torch.empty_like(p) for p in model.parameters()] if config.train.ema else []
        kept = {"weights": list(model.state_dict().values()), "optimizer": moments, "ema": average}
        for part, tensors in kept.items():
            _count(trace, tensors, part)
        trace.part = "batches"
        batches = [batch.to("meta") for _ in range(2 * config.data.bins_per_step)]
        trace.part, trace.place = "embedding", "forward"
        run = [_renamed(bin, number) for number, bin in enumerate(batches[: min(2, config.data.bins_per_step)])]
        if (size := config.train.sequence_parallel) > 1:
            run = [shard_batch(_renamed(batch, number), 0, size, group=None).to("meta") for number in range(len(run))]
        _take_step(model, run, trace)
    parts = {part: size for part, size in trace.at_peak.items() if size}
    copies = sum(tensor.nbytes for tensors in kept.values() for tensor in tensors)
    return parts | {"total": trace.peak, "peak_at": trace.peak_at, "host_copies": copies}


def _renamed(batch: PackedBatch, number: int) -> PackedBatch:
    """The same with samples of its own: what is compared are all bins' embeddings."""
    pairs = {view: tuple(sample + (number << 30) for sample in samples) for view, samples in batch.pairs.items()}
    return replace(batch, pairs=pairs)


def _take_step(model: MmctxModel, batches: list[PackedBatch], trace: StorageTrace) -> None:
    """Forward and backward passes in the trainer's order; counts and weights are of no account."""
    ones = dict.fromkeys(model.objectives, 1)
    step = GradientStep(_Alone(trace), model, model, ones)  # type: ignore[arg-type]
    step([MicroBatch(0, batch) for batch in batches], Muster(ones, ones, Roster.of(*batches)))


class _Alone:
    """What a `GradientStep` asks of its accelerator, of one process on the meta device."""

    device, num_processes = torch.device("meta"), 1

    def __init__(self, trace: StorageTrace) -> None:
        self._trace = trace

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nobody to synchronise with."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """From an edge of the graph: with a tensor the whole backward would run outside of FusedAttention, as functions that it sees do."""
        self._trace.place = "backward"
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones_like(loss))
        self._trace.part, self._trace.place = "embedding", "forward"


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
    for name, half in model.objectives.items():
        if isinstance(half, ComparingHalf):  # its parts are called one by one
            for method in ("embed_batch", "compare"):
                setattr(half, method, _placed(trace, "objectives", f"loss of {name}", getattr(half, method)))
    for name, (part, module) in modules.items():
        module.register_forward_pre_hook(partial(_enter, trace, part, name))
        module.register_forward_hook(partial(_leave, trace, part, name), always_call=True)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: trace.count(p.grad, "gradients"))  # type: ignore[arg-type]


def _placed(trace: StorageTrace, part: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; the trace knows when it runs, and when its backward does."""

    def placed(*args: Any) -> Any:
        _enter(trace, part, name)
        output = function(*args)
        _leave(trace, part, name, None, args, output)
        return output

    return placed


def _enter(trace: StorageTrace, part: str, name: str, *call: Any) -> None:
    trace.part, trace.place = part, f"forward of {name}"


def _leave(trace: StorageTrace, part: str, name: str, module: nn.Module | None, args: Any, output: Any) -> None:
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(partial(_turn, trace, part, name))
    trace.part, trace.place = "embedding", "forward"


def _turn(trace: StorageTrace, part: str, name: str, gradient: Tensor) -> None:
    """The gradient of a module's output is there: its backward begins."""
    trace.part, trace.place = part, f"backward of {name}"
