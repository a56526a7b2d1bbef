"""Folders of tiny models with random weights, as the trainer writes them and as it used to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmctx.config import build_config
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.checkpoints.saver import save_checkpoint
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.config import RunConfig
from mmctx.train.optim import build_optimizer


def write_checkpoint(tree: dict[str, Any], folder: Path, step: int = 1) -> Path:
    """A checkpoint after `step` steps, weights away from their neutral start."""
    config = build_config(RunConfig, tree, "tree")
    tokenizer = TextTokenizer(config.data.tokenizer)
    model = build_model(config, len(tokenizer))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    optimizer = build_optimizer(model, config.train.optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(folder, config, model, tokenizer, optimizer, TrainerState(step=step))


def as_earlier(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint as versions without `mmctx.hf` wrote them."""
    shutil.copytree(checkpoint, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: tree[key] for key in ("model_type", "vocab_size", "run")}))
    for name in ("modeling_mmctx.py", "generation_config.json", "processor_config.json"):
        (folder / name).unlink()
    return folder
