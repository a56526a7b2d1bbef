"""A model that is wrapped for several processes, once other parameters are trained than before."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrap_again(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The same model wrapped anew, if its wrapper looks only once at which parameters ask for gradients, as DDP does.

    All ranks call it together, and let go of the old wrapper.
    """
    if not isinstance(model, DistributedDataParallel):
        return model
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator._models.remove(bare)
    return accelerator.prepare_model(bare)
