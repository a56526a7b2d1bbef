"""From a `RunConfig` to its model."""

from __future__ import annotations

import torch

from mmctx.model import MmctxModel
from mmctx.train.config import RunConfig


def build_model(config: RunConfig, vocab_size: int) -> MmctxModel:
    """The model with weights drawn from the run's seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = MmctxModel(config.model, config.objectives, vocab_size)
    model.set_activations(config.train.activations)
    model.set_compiler("inductor" if config.train.compile else None)
    return model
