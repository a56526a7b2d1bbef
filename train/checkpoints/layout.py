"""Where checkpoints lie in a run's folder, and which of them is the newest whole one."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.manifest import COMPLETE, verify

Say = Callable[[str], None]


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def final_path(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / f"checkpoint-{step}"


def partial_path(run_dir: Path, step: int) -> Path:
    """Where it is written; nobody looks there."""
    return run_dir / f".partial-checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint was written after, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that were written to the end, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / COMPLETE).exists()), key=step_of)


def newest_whole(run_dir: Path, *, optimizer: bool = True, say: Say = _warn) -> Path | None:
    """The newest checkpoint of a run whose files are as they were written; None where there never was one.

    Args:
        run_dir: the run's folder.
        optimizer: as in `verify`.
        say: told of each newer one that is passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    checkpoints = list_checkpoints(run_dir)
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint, optimizer)
        except CheckpointError as error:
            say(f"WARNING: {error}\n{checkpoint.name} is passed over, looking for the one before it")
            continue
        return checkpoint
    if checkpoints:
        raise CheckpointError(
            f"{run_dir}: none of its {len(checkpoints)} checkpoints is whole (see above); restore one from a copy, or set run.name to "
            "start a new run"
        )
    return None


def resolve_checkpoint(path: Path, *, optimizer: bool = False, say: Say = _warn) -> Path:
    """A checkpoint folder from itself or from its run folder (then the newest whole one); its files are as they were written.

    Raises:
        CheckpointError: it is not whole, or there is none.
    """
    if (path / COMPLETE).exists():
        verify(path.resolve(), optimizer)
        return path.resolve()
    if path.is_dir() and (found := newest_whole(path, optimizer=optimizer, say=say)):
        return found
    raise CheckpointError(f"{path}: neither a whole checkpoint (with a file COMPLETE) nor a run folder that holds one")


def remove_partials(run_dir: Path) -> None:
    """Deletes what kills left of checkpoints that were being written."""
    for partial in run_dir.glob(".partial-checkpoint-*"):
        shutil.rmtree(partial)


def delete(checkpoint: Path) -> None:
    """COMPLETE goes first: a kill halfway must not leave a folder that looks whole."""
    if checkpoint.exists():
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def point_latest(run_dir: Path, checkpoint: Path) -> None:
    """Moves the link `latest` in one go."""
    link = run_dir / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    os.replace(link, run_dir / "latest")
