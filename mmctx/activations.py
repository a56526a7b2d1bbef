"""What a training step keeps for its backward pass, and what it computes again instead.

These settings change memory and time, never losses or gradients: they belong to the trainer (`train.activations`), not to the shape of the
model, and `MmctxModel.set_activations` applies them to a model that is built.

Shapes: T tokens or items, ... any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mmctx.config import StrictModel

ATTENTION_KERNELS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "mmctx::memory_attention",
    }
)
"""What selective checkpointing keeps the results of. Kernels that PyTorch's dispatcher does not see (flash4) run again."""

# Results of kernels go to the host with the inputs, if offloading is on; PyTorch before 2.14 leaves them where they are.
_OFFLOAD_KEPT = "respect_saved_tensors_hooks" in signature(checkpoint).parameters


class ActivationsConfig(StrictModel):
    """Memory against time in the backward pass; losses and gradients stay the same."""

    checkpoint: Literal["none", "full", "selective"] = "none"
    """none: keep all. full: keep the input of each block, compute the block again (Chen et al. 2016). selective: keep what attention gave
    as well, so that its work, which grows with the square of the length, is not done again (Korthikanti et al. 2022)."""
    every: int = Field(default=1, ge=1)
    """`checkpoint` holds for every n-th block of the trunk: 2 keeps everything of every other block."""
    offload: bool = False
    """On CUDA, what checkpointed blocks keep waits in pinned host memory; copies run beside the computation. Nothing on CPU."""
    mlp_tile: int | None = Field(default=None, ge=1)
    """Tokens that pass through a block's MLP at a time, forward and backward (Arctic Long Sequence Training, Bekman et al. 2025)."""
    media_chunk: int | None = Field(default=None, ge=1)
    """Pictures, or chunks of sound, that are encoded at a time; all but one chunk's activations are computed again in the backward."""

    @model_validator(mode="after")
    def _check(self) -> ActivationsConfig:
        if self.offload and self.checkpoint == "none":
            raise ValueError("offload moves what checkpointed blocks keep: set checkpoint to full or selective")
        return self

    def recomputes(self, layer: int) -> bool:
        """Whether this block of the trunk is checkpointed: the first, then every n-th."""
        return self.checkpoint != "none" and layer % self.every == 0


KEEP_ALL = ActivationsConfig()
"""What a model does that was told nothing."""


def recompute(
    function: Callable[[Tensor], Tensor], x: Tensor, *, keep_attention: bool = False, random: bool = False
) -> Tensor:
    """`function(x)`, of which only `x` is kept: the backward pass calls `function` again.

    Args:
        function: may hold other tensors in its closure, which stay alive.
        x: the tensor to keep.
        keep_attention: keep results of attention kernels as well.
        random: the function draws random numbers (dropout), which must be the same the second time.
    """
    options: dict[str, Any] = {}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        if _OFFLOAD_KEPT:
            options["respect_saved_tensors_hooks"] = True
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=random, **options)  # type: ignore[return-value]


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, size: int, *, random: bool = False) -> Tensor:
    """`function(x)` for functions that treat rows apart, `size` rows at a time, each tile computed again in the backward pass.

    (T, ...) -> (rows of all outputs, ...). Only `x` is kept; everything else exists for one tile at a time. Gradients of weights are sums
    over tiles, so they round otherwise than without.
    """
    return torch.cat([recompute(function, tile, random=random) for tile in x.split(size)])


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op.name() in ATTENTION_KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
