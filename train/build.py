"""From a `RunConfig` to its model."""

from __future__ import annotations

import torch

from mmctx.model import MmctxModel
from mmctx.pretrained.trunk import check_vocabulary, load_trunk
from mmctx.train.config import RunConfig
from mmctx.train.init import Origin, start_from
from mmctx.train.optim.modules import check_modules
from mmctx.train.tuning import check_trained
from mmctx.tuning import apply_tuning, default_freezing


def build_model(config: RunConfig, vocab_size: int) -> MmctxModel:
    """The model with weights drawn from the run's seed, or from `pretrained` folders, or from `train.init`; the global generator is left
    as it was.

    Raises:
        ConfigError: `train.modules` or a stage's names no module of it, or freezes all of it; or a folder or checkpoint does not fit.
    """
    folder = config.model.transformer.pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = MmctxModel(config.model, config.objectives, vocab_size)
        if folder is not None:
            check_vocabulary(folder, config.data.tokenizer, config.data.bos)
            load_trunk(model, folder)
        if config.train.init is not None:
            model.origin = start_from(model, config.train.init)
        apply_tuning(model, config.train.tune, config.steps)
    for stage in config.stages:
        where = f"train.modules, with schedule.{stage.number}.modules" if config.schedule else "train.modules"
        check_modules(model, stage.config.train.modules, where, default_freezing(model))
    if isinstance(model.origin, Origin):
        check_trained(model, model.origin, config)
    model.set_activations(config.train.activations)
    model.set_compiler("inductor" if config.train.compile else None)
    return model
