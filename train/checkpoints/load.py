"""What a checkpoint gives back: configuration, model, weights, the optimizer's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmctx.config import build_config
from mmctx.errors import CheckpointError
from mmctx.model import ENCODERS, MmctxModel, ModelConfig
from mmctx.tokenizer import TextTokenizer
from mmctx.train.checkpoints.files import read_json
from mmctx.train.checkpoints.layout import resolve_checkpoint
from mmctx.train.checkpoints.manifest import OPTIMIZER
from mmctx.train.checkpoints.optimizer_state import read_tensors, restore_state
from mmctx.train.checkpoints.sharded import is_sharded, read_for_ranks
from mmctx.train.checkpoints.state import read_state
from mmctx.train.config import RunConfig
from mmctx.train.stages import trained_stage
from mmctx.tuning import apply_tuning
from mmctx.tuning.apply import renamed

WEIGHTS = "model.safetensors"


def load_run_config(checkpoint: Path) -> RunConfig:
    """The configuration that a checkpoint was trained with."""
    description = read_json(checkpoint / "config.json")
    return build_config(RunConfig, description["run"], where=str(checkpoint / "config.json"))


def load_model(checkpoint: Path) -> tuple[MmctxModel, TextTokenizer, RunConfig]:
    """Model (in evaluation mode), tokenizer and configuration of a checkpoint or run folder, as in the stage that it was trained in.

    Raises:
        CheckpointError: a file is not as it was written, or there is no whole checkpoint.
    """
    return read_model(resolve_checkpoint(checkpoint))


def read_model(checkpoint: Path) -> tuple[MmctxModel, TextTokenizer, RunConfig]:
    """As `load_model`, for a checkpoint folder that has been verified."""
    config = trained_stage(load_run_config(checkpoint), read_state(checkpoint).step).config
    shape = without_pretrained(config.model)
    model = MmctxModel(shape, config.objectives, read_json(checkpoint / "config.json")["vocab_size"])
    with torch.random.fork_rng(devices=[]):
        apply_tuning(model, config.train.tune, config.steps)
    load_weights(model, checkpoint)
    return model.eval(), TextTokenizer(checkpoint, config.data.bos), config


def without_pretrained(config: ModelConfig) -> ModelConfig:
    """The same shape with fresh weights: a checkpoint brings its own, so no folder is read and nothing needs downloading."""
    fresh: dict[str, Any] = {"transformer": config.transformer.model_copy(update={"pretrained": None})}
    for kind in ENCODERS:
        part = getattr(config, kind)
        if part is not None and "pretrained" in type(part).model_fields:
            fresh[kind] = part.model_copy(update={"pretrained": type(part).model_fields["pretrained"].default})
    return config.model_copy(update=fresh)


def without_origin(config: RunConfig) -> RunConfig:
    """The same run, its fresh weights drawn from the seed alone, which costs nothing to read."""
    train = config.train.model_copy(update={"init": None})
    return config.model_copy(update={"model": without_pretrained(config.model), "train": train})


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads `model.safetensors`; every tensor must be there with its shape."""
    weights = renamed(load_tensors(checkpoint), model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint / WEIGHTS}: does not fit the configured model: {error}") from None


def load_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """What `model.safetensors` holds, by the names that tensors have on the disk; see `disk_name`."""
    path = checkpoint / WEIGHTS
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types for damaged files
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete {checkpoint} to fall back to the one before it"
        ) from None


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Loads the optimizer's state, on any number of ranks and whatever number wrote it.

    Raises:
        CheckpointError: it belongs to another model.
    """
    folder = checkpoint / OPTIMIZER
    tensors = read_for_ranks(model, folder) if is_sharded(model, folder) else read_tensors(folder)
    restore_state(model, optimizer, tensors, folder)
