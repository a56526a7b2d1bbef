"""Writes a checkpoint under a temporary name, flushes it to the disk, renames it, then moves `latest` there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.files import flush, write_json
from mmctx.train.checkpoints.layout import delete, final_path, partial_path, point_latest
from mmctx.train.checkpoints.manifest import OPTIMIZER, seal
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.optim.ema import save_ema
from mmctx.tuning.peft_files import ADAPTER_WEIGHTS

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint will hold, on the host.

    Attributes:
        state: with the step that names it.
        description: `config.json`.
        weights: whole tensors, as the model names them.
        optimizer: see `named_state`; with several ranks that hold parts, this rank's.
        texts: further files by name, such as the tokenizer's.
        average: averaged weights by the parameters' names; none where the run keeps none.
        metrics: the line of metrics.jsonl of this step, for `train.keep.best`.
        adapter: of a tuned model, what peft would save of it; see `mmctx.tuning.peft_files`.
    """

    state: TrainerState
    description: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    average: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of its tensors and texts: what the disk must have room for, give or take a few kB."""
        tensors = sum(
            tensor.nbytes
            for part in (self.weights, self.optimizer, self.average, self.adapter)
            for tensor in part.values()
        )
        return tensors + sum(map(len, self.texts.values()))


def write_checkpoint(
    run_dir: Path, contents: Contents, write_optimizer: Callable[[Mapping[str, Tensor], Path], None] | None = None
) -> Path:
    """One process's checkpoint, or what the first of several ranks does for all of them.

    Args:
        run_dir: the run's folder.
        contents: what it will hold.
        write_optimizer: writes the optimizer's tensors into an empty folder; by default, into one file.

    Returns:
        Its folder.

    Raises:
        CheckpointError: the disk is full; nothing of it is left, and the checkpoints before it are as they were.
    """
    step = contents.state.step
    final, partial = final_path(run_dir, step), partial_path(run_dir, step)
    try:
        require_space(run_dir, contents.num_bytes)
        _fill(partial, contents, write_optimizer or _write_whole)
        seal(partial, {"step": step, "metrics": dict(contents.metrics)})
        delete(final)  # a damaged one that was passed over
        os.rename(partial, final)
        point_latest(run_dir, final)
        flush(run_dir)
    except Exception as error:
        free = shutil.disk_usage(run_dir).free
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointError) or not _is_full(error, free):
            raise
        raise CheckpointError(_full(final, contents.num_bytes, free)) from error
    return final


def require_space(run_dir: Path, needed: int) -> None:
    """Looks before it writes: a full disk is found at once, not after minutes of writing.

    Raises:
        OSError: there is not room for `needed` bytes.
    """
    if shutil.disk_usage(run_dir).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run_dir))


def _fill(partial: Path, contents: Contents, write_optimizer: Callable[[Mapping[str, Tensor], Path], None]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / OPTIMIZER).mkdir(parents=True)
    write_json(partial / "config.json", dict(contents.description))
    write_json(partial / "trainer" / "trainer_state.json", asdict(contents.state))
    for name, text in contents.texts.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(text)
    if contents.adapter:
        save_file(dict(contents.adapter), partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_file(dict(contents.weights), partial / "model.safetensors", metadata={"format": "pt"})
    if contents.average:
        save_ema(contents.average, partial / "trainer")
    write_optimizer(contents.optimizer, partial / OPTIMIZER)


def _write_whole(tensors: Mapping[str, Tensor], folder: Path) -> None:
    save_file(dict(tensors), folder / "optimizer.safetensors")


def _is_full(error: Exception, free: int) -> bool:
    """safetensors does not hand the number of the error on: then an all but full disk is the cause."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or (number is None and free < 1 << 20)


def _full(path: Path, needed: int, free: int) -> str:
    return (
        f"{path}: the disk is full: the checkpoint needs {needed:,} bytes, {free:,} are free; nothing of it was left behind and the "
        "checkpoints before it are intact. Make room, lower train.keep, or move run.dir, then run the same command to go on"
    )
