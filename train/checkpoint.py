"""Checkpoints: written whole or not at all, read only when whole.

runs/NAME/checkpoint-1000/   config.json model.safetensors and the tokenizer's files
    trainer/                 optimizer.pt trainer_state.json, and ema.safetensors where train.ema is set
    COMPLETE                 written last
runs/NAME/latest             symbolic link to the newest
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmctx.config import build_config
from mmctx.errors import CheckpointError
from mmctx.model import MmctxModel, ModelConfig
from mmctx.tokenizer import TextTokenizer
from mmctx.train.config import RunConfig
from mmctx.train.optim.ema import Ema, save_ema
from mmctx.train.optim.guard import GuardState
from mmctx.train.stages import find_changed_past, trained_stage

FREE_TO_CHANGE = (
    "run",
    "eval",
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.audit",
    "train.trackers",
    "train.peak_tflops",
    "train.guard",
    "train.num_threads",
    "train.activations",
    "train.compile",
    "train.sequence_parallel",
    "train.deterministic",
    "data",
    "schedule",
    "model.transformer.attention",
)
"""Keys that a resumed run may set otherwise without becoming another run. `train.segments` knows what a change of `data` means; of
`schedule`, what has been trained may not change."""


@dataclass
class TrainerState:
    """Everything a run is besides weights and optimizer. Of the data the step is enough, with the segments of the plan so far.

    Attributes:
        skips: samples skipped so far, by reason.
        left_out: samples drawn so far that the index or their sizes rule out, by reason.
        segments: `Segment.to_json` of each.
        guard: what the guard knows of usual gradients.
    """

    step: int = 0
    tokens: int = 0
    tokens_by_modality: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    skips: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    train_seconds: float = 0.0
    planned_steps: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    guard: GuardState = field(default_factory=GuardState)

    @property
    def skipped(self) -> int:
        """Samples skipped so far."""
        return sum(self.skips.values())


def save_checkpoint(
    run_dir: Path,
    config: RunConfig,
    model: MmctxModel,
    tokenizer: TextTokenizer,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    ema: Ema | None = None,
) -> Path:
    """Writes `checkpoint-STEP` under a temporary name, flushes it to disk, renames it, then moves `latest` there."""
    final = run_dir / f"checkpoint-{state.step}"
    partial = run_dir / f".partial-checkpoint-{state.step}"
    if (final / "COMPLETE").exists():  # saved a moment ago, as when Ctrl-C comes right after a periodic save
        return final
    for leftover in (partial, final):
        _delete(leftover)
    (partial / "trainer").mkdir(parents=True)
    description = {"model_type": "mmctx", "vocab_size": model.vocab_size, "run": config.model_dump(mode="json")}
    (partial / "config.json").write_text(json.dumps(description, indent=2, ensure_ascii=False))
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(partial)
    torch.save(optimizer.state_dict(), partial / "trainer" / "optimizer.pt")
    if ema is not None:
        save_ema(ema, partial / "trainer")
    (partial / "trainer" / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2))
    (partial / "COMPLETE").touch()
    for path in sorted(partial.rglob("*"), reverse=True):
        _flush(path)
    os.rename(partial, final)
    _point_latest(run_dir, final)
    _flush(run_dir)
    ends = {f"checkpoint-{stage.stop}" for stage in config.stages} if config.schedule else set()
    passing = [path for path in list_checkpoints(run_dir) if path.name not in ends]
    for old in passing[: -config.train.keep_checkpoints]:
        _delete(old)
    return final


def _delete(checkpoint: Path) -> None:
    """COMPLETE goes first: a kill halfway must not leave a folder that looks whole."""
    if checkpoint.exists():
        (checkpoint / "COMPLETE").unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(
        (p for p in found if (p / "COMPLETE").exists()), key=lambda p: int(p.name.removeprefix("checkpoint-"))
    )


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from itself or from its run folder (then the newest whole one)."""
    if (path / "COMPLETE").exists():
        return path.resolve()
    if checkpoints := list_checkpoints(path) if path.is_dir() else []:
        return checkpoints[-1]
    raise CheckpointError(f"{path}: neither a whole checkpoint (with a file COMPLETE) nor a run folder that holds one")


def load_run_config(checkpoint: Path) -> RunConfig:
    """The configuration that a checkpoint was trained with."""
    description = _read_json(checkpoint / "config.json")
    return build_config(RunConfig, description["run"], where=str(checkpoint / "config.json"))


def load_model(checkpoint: Path) -> tuple[MmctxModel, TextTokenizer, RunConfig]:
    """Model (in evaluation mode), tokenizer and configuration of a checkpoint or run folder, as in the stage that it was trained in."""
    checkpoint = resolve_checkpoint(checkpoint)
    config = trained_stage(load_run_config(checkpoint), read_state(checkpoint).step).config
    shape = without_pretrained(config.model)
    model = MmctxModel(shape, config.objectives, _read_json(checkpoint / "config.json")["vocab_size"])
    load_weights(model, checkpoint)
    return model.eval(), TextTokenizer(checkpoint), config


def without_pretrained(config: ModelConfig) -> ModelConfig:
    """The same shape with fresh encoder weights: a checkpoint brings its own, so nothing needs downloading."""
    if config.image is None:
        return config
    return config.model_copy(update={"image": config.image.model_copy(update={"pretrained": False})})


def load_weights(model: MmctxModel, checkpoint: Path) -> None:
    """Loads `model.safetensors`; every tensor must be there with its shape."""
    path = checkpoint / "model.safetensors"
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own types for damaged files
        raise CheckpointError(
            f"{path}: cannot be read ({error}); delete {checkpoint} to fall back to the checkpoint before it"
        ) from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the configured model: {error}") from None


def resume(
    run_dir: Path, config: RunConfig, model: MmctxModel, optimizer: torch.optim.Optimizer
) -> TrainerState | None:
    """Loads the newest whole checkpoint of the run, if there is one.

    Raises:
        CheckpointError: it was made with another configuration (the first differing keys are named with both values).
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return None
    checkpoint = checkpoints[-1]
    state = read_state(checkpoint)
    check_same_run(load_run_config(checkpoint), config, checkpoint, state.step)
    load_weights(model, checkpoint)
    path = checkpoint / "trainer" / "optimizer.pt"
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, OSError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error!r}); delete {checkpoint} to fall back to the one before it"
        ) from None
    return state


def read_state(checkpoint: Path) -> TrainerState:
    """The `trainer_state.json` of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another version of mmctx.
    """
    path = checkpoint / "trainer" / "trainer_state.json"
    try:
        tree = _read_json(path)
        tree["guard"] = GuardState(**tree["guard"])
        return TrainerState(**tree)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: written by another version of mmctx ({error}); set run.name to start a new run"
        ) from None


def check_same_run(saved: RunConfig, asked: RunConfig, where: Path, step: int) -> None:
    """Refuses to go on, after `step` steps, with a run under a configuration that would make it another run."""
    before, now = _flatten(saved.model_dump(mode="json")), _flatten(asked.model_dump(mode="json"))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(fnmatch(key, free) or fnmatch(key, f"{free}.*") for free in FREE_TO_CHANGE)
    ]
    lines = [f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} asked for" for key in changed]
    lines += find_changed_past(saved, asked, step)
    if lines:
        listed = "\n".join(lines[:8])
        raise CheckpointError(
            f"{where} was made with another configuration:\n{listed}\nSet run.name to start a new run, or restore these values. "
            f"What changes from step {step} on, such as model.transformer.rope, is a further stage of `schedule`."
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {k: v for name, part in tree.items() for k, v in _flatten(part, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): tree}


def _point_latest(run_dir: Path, checkpoint: Path) -> None:
    link = run_dir / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    os.replace(link, run_dir / "latest")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
