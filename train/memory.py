"""How much memory a training step will take, from shapes alone: the model and the largest planned bin are run on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor

from mmctx.model import MmctxModel, count_parameters
from mmctx.pack import PackedBatch
from mmctx.train.checkpoint import without_pretrained
from mmctx.train.config import RunConfig

BYTES = 4  # of a float32: weights, gradients and AdamW's moments are kept in it


def estimate_memory(config: RunConfig, batch: PackedBatch, vocab_size: int) -> dict[str, int]:
    """Bytes that one process needs at the end of the forward pass over `batch`, where memory peaks, by what they are for.

    Weights, gradients, AdamW's two moments, and what autograd keeps for the backward pass; not the library itself, workspaces of kernels
    and data loaders. Activations are counted in float32: under bf16 autocast they take between half and all of that.
    """
    with torch.device("meta"):
        model = MmctxModel(without_pretrained(config.model), config.objectives, vocab_size)
    own = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := _storage(tensor)) not in own:
            kept[storage] = tensor  # held on to, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.train()(batch.to("meta"))
    del losses
    weights = count_parameters(model) * BYTES
    activations = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    parts = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "activations": activations}
    return parts | {"total": sum(parts.values())}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
