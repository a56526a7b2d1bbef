"""From a config to modules with fresh weights."""

from __future__ import annotations

from torch import nn

from mmctx.hf.config import MmctxConfig
from mmctx.model import ENCODERS, MmctxModel
from mmctx.train.checkpoints.load import without_pretrained


def build_native(config: MmctxConfig) -> MmctxModel:
    """A model with fresh weights; no folder or library is asked for others."""
    return MmctxModel(without_pretrained(config.shape), config.objective_configs, config.vocab_size)


def build_encoders(config: MmctxConfig) -> nn.ModuleDict:
    """Its encoders alone, as they would be in `build_native`."""
    shape = without_pretrained(config.shape)
    return nn.ModuleDict(
        {
            kind: build(part, shape.transformer.width)
            for kind, build in ENCODERS.items()
            if (part := getattr(shape, kind)) is not None
        }
    )
