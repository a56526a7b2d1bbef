"""How much memory a training step will take, from shapes alone: the model and the largest planned bin are run on the meta device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmctx.model import MmctxModel, count_parameters
from mmctx.pack import PackedBatch
from mmctx.parallel.shard import shard_batch
from mmctx.train.checkpoint import without_pretrained
from mmctx.train.config import RunConfig

BYTES = 4  # of a float32: weights, gradients and AdamW's moments are kept in it


def estimate_memory(config: RunConfig, batch: PackedBatch, vocab_size: int) -> dict[str, int]:
    """Bytes that one process needs at the end of the forward pass over `batch`, where memory peaks, by what they are for.

    Weights, gradients, AdamW's two moments, and what autograd keeps for the backward pass; not the library itself, workspaces of kernels
    and data loaders. With sequence parallel, of the part of the batch that the first process computes. Activations are counted in float32:
    under bf16 autocast they take between half and all of that.
    """
    if (size := config.train.sequence_parallel) > 1:
        batch = shard_batch(batch, 0, size, group=None)
    with torch.device("meta"):
        model = MmctxModel(without_pretrained(config.model), config.objectives, vocab_size)
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := _storage(tensor)) not in own:
            kept[storage] = tensor  # held on to, so that no other storage takes its place
        return tensor

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.train()(batch.to("meta"))
    del losses
    weights = count_parameters(model) * BYTES
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    parts = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "activations": activations}
    return parts | {"total": sum(parts.values())}


class FusedAttention(TorchFunctionMode):
    """Lets attention keep what fused kernels keep: PyTorch falls back to the unfused one on the meta device, which would keep the
    probabilities of all pairs of tokens, hundreds of times as much for a long document.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Attention is replaced, all else is called as it is."""
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Shapes and storages alone: q (B, H, L, d), k and v (B, K, S, d) -> (B, H, L, d), a view of (B, L, H, d) as kernels write it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length))  # the last: sums of exponentials
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
