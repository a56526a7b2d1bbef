"""Which checkpoint a run goes on from: the first rank looks, all take the same."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.layout import newest_whole, remove_partials


def checkpoint_to_resume(run_dir: Path, accelerator: Accelerator) -> Path | None:
    """The newest whole checkpoint, the same on every rank; None for a run that has none. What kills left half written is deleted.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    found: list[str | None] = [None, None]  # its path, or what is wrong
    if accelerator.is_main_process:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_partials(run_dir)
        try:
            found[0] = str(newest_whole(run_dir) or "")
        except CheckpointError as error:
            found[1] = str(error)
    path, error = broadcast_object_list(found)
    if error is not None:
        raise CheckpointError(error)
    return Path(path) if path else None
