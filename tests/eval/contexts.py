"""Contexts to evaluate in."""

from __future__ import annotations

from typing import Any

import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.eval import EvalContext
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


def far_from_neutral(tree: dict[str, Any]) -> EvalContext:
    """A run's held-out data and an untrained model whose weights are so large that it does look at what it reads."""
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    torch.manual_seed(0)
    model = build_model(config, len(data.tokenizer)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
