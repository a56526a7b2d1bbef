"""From a `RunConfig` to its model."""

from __future__ import annotations

import torch

from mmctx.model import MmctxModel
from mmctx.pretrained.trunk import check_vocabulary, load_trunk
from mmctx.train.config import RunConfig
from mmctx.train.optim.modules import check_modules


def build_model(config: RunConfig, vocab_size: int) -> MmctxModel:
    """The model with weights drawn from the run's seed, or from `pretrained` folders; the global generator is left as it was.

    Raises:
        ConfigError: `train.modules` or a stage's names no module of it, or freezes all of it; or a folder does not fit.
    """
    folder = config.model.transformer.pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = MmctxModel(config.model, config.objectives, vocab_size)
        if folder is not None:
            check_vocabulary(folder, config.data.tokenizer)
            load_trunk(model, folder)
    for stage in config.stages:
        where = f"train.modules, with schedule.{stage.number}.modules" if config.schedule else "train.modules"
        check_modules(model, stage.config.train.modules, where)
    model.set_activations(config.train.activations)
    model.set_compiler("inductor" if config.train.compile else None)
    return model
