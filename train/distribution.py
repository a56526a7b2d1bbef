"""How a model lies on several processes: whole on each (DDP), or in parts that are gathered when they are needed (FSDP2).

Both average gradients over the processes, so the trainer multiplies its loss by their number. Both need every process to do the same
exchanges in the same order: `MmctxModel` runs all of its encoders for every batch, whatever the batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmctx.config import StrictModel
from mmctx.model import MmctxModel


class DistributionConfig(StrictModel):
    """What each of several processes holds; losses and gradients are the same. Nothing for one process."""

    kind: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every process holds the whole model. fsdp2: weights, gradients and optimizer are split over all processes, block by block, and
    a block's weights are gathered while it runs (ZeRO-3, Rajbhandari et al. 2020; `fully_shard` of PyTorch)."""
    cpu_offload: bool = False
    """With fsdp2, what a process holds waits in host memory, where the optimizer runs, too. Nothing on CPU; not tried on a GPU so far."""
    reshard_after_forward: bool = True
    """With fsdp2, a block's weights are given up after its forward pass and gathered again for the backward. false keeps them: more memory,
    less to exchange."""


def handlers(config: DistributionConfig) -> list[Any]:
    """What the accelerator must know before processes meet: what waits in host memory is exchanged there."""
    if config.kind == "fsdp2" and config.cpu_offload and torch.cuda.is_available():
        return [InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl")]
    return []


def distribute(model: MmctxModel, config: DistributionConfig, accelerator: Accelerator) -> nn.Module:
    """The model as the trainer calls it, on the device. Optimizers are made after this: it may exchange the parameters.

    Args:
        model: with its weights loaded, on the host; under fsdp2 it is changed in place.
        config: how.
        accelerator: of the run.
    """
    if accelerator.num_processes > 1:
        WRAPPERS[config.kind](model, config, accelerator)
    sharded = is_sharded(model)
    # "evaluation" leaves DDP out; autocast is put around the forward pass in any case
    return accelerator.prepare_model(model, device_placement=not sharded, evaluation_mode=sharded)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def without_exchange(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Inside, backward passes keep gradients to themselves: the next one outside exchanges their sum."""
    if not is_sharded(model):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)  # type: ignore[operator]


def clip_gradients(model: nn.Module, accelerator: Accelerator, norm: float) -> Tensor:
    """Scales gradients down to a global norm; returns the norm that they had, over all processes."""
    total = accelerator.clip_grad_norm_(model.parameters(), norm)
    return total.full_tensor() if isinstance(total, DTensor) else total  # type: ignore[return-value]


def _whole(model: MmctxModel, config: DistributionConfig, accelerator: Accelerator) -> None:
    """DDP is accelerate's."""


def _fully_shard(model: MmctxModel, config: DistributionConfig, accelerator: Accelerator) -> None:
    """Splits each block over all processes, and what is left as one more part.

    In bf16 blocks are gathered, and compute, in that: gradients are added up in fp32. What is not a block (embeddings, norms, projectors,
    heads) stays in fp32 under autocast, as everything does under DDP.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    device = accelerator.device.type
    mesh = init_device_mesh(device, (accelerator.num_processes,))
    offload = CPUOffloadPolicy() if config.cpu_offload and device != "cpu" else OffloadPolicy()
    rough = accelerator.mixed_precision == "bf16"
    # Not FSDP's own cast of inputs: it takes frozen dataclasses apart, and with them what layers share in `DocumentLayout.cache`.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32, cast_forward_inputs=False)
    for part, is_block in _parts(model):
        fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=policy if rough and is_block else MixedPrecisionPolicy(),
            offload_policy=offload,
        )
        if rough and is_block:
            part.register_forward_pre_hook(_to_bf16)
    fully_shard(model, mesh=mesh, offload_policy=offload)


def _parts(model: MmctxModel) -> Iterator[tuple[nn.Module, bool]]:
    """Blocks of the trunk, and of each encoder; and whether a part is one.

    Each part is gathered whenever it runs, so it must run as often on all processes. An encoder that takes its items in chunks, or pictures
    of several sizes, runs its blocks once for each: then it is one part as a whole.
    """
    for encoder in model.encoders.values():
        if encoder.one_pass:
            yield from ((block, True) for block in encoder.blocks)  # type: ignore[union-attr]
        else:
            yield encoder, False
    yield from ((block, True) for block in model.trunk.blocks)


def _to_bf16(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].to(torch.bfloat16), *arguments[1:])


WRAPPERS: Mapping[str, Callable[[MmctxModel, DistributionConfig, Accelerator], None]] = {
    "ddp": _whole,
    "fsdp2": _fully_shard,
}
