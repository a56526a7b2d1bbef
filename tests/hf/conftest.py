"""Checkpoints of tiny models with random weights, as the trainer writes them, and what they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tree

from mmctx.config import build_config
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.checkpoints.saver import save_checkpoint
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.config import RunConfig
from mmctx.train.optim import build_optimizer

UNTIED = {"tie_embeddings": False, "windows": [5, None], "norm": "layer", "qkv_bias": True}


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


@pytest.fixture(scope="session")
def make(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(transformer={...}, **sections)` writes a checkpoint."""

    def build(transformer: dict[str, Any] | None = None, step: int = 1, **sections: Any) -> Path:
        root = tmp_path_factory.mktemp("hf")
        tree = tiny_tree(corpus, root)
        tree["model"]["transformer"] |= transformer or {}
        return write_checkpoint(tree | sections, root / "run", step)

    return build


@pytest.fixture(scope="session")
def checkpoint(make: Callable[..., Path]) -> Path:
    """Tied embeddings, grouped heads, RMSNorm. Not to be changed."""
    return make()


@pytest.fixture(scope="session")
def untied(make: Callable[..., Path]) -> Path:
    """An output head, a window in the first layer, LayerNorm, biases. Not to be changed."""
    return make(UNTIED)


@pytest.fixture(scope="session", params=["tied", "untied"])
def either(request: pytest.FixtureRequest, checkpoint: Path, untied: Path) -> Path:
    """Both, in turn."""
    return checkpoint if request.param == "tied" else untied


def as_earlier(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint as versions without `mmctx.hf` wrote them."""
    import shutil

    shutil.copytree(checkpoint, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: tree[key] for key in ("model_type", "vocab_size", "run")}))
    for name in ("modeling_mmctx.py", "generation_config.json", "processor_config.json"):
        (folder / name).unlink()
    return folder
