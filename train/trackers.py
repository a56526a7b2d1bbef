"""Who else gets the lines of metrics.jsonl: TensorBoard and Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

TrackerName = Literal["tensorboard", "wandb"]

EXTRAS: dict[str, str] = {"tensorboard": "train", "wandb": "wandb"}
"""The extra that brings each."""


class Trackers:
    """The trackers of a run; lives in the main process alone.

    Args:
        names: which.
        run_dir: the run's folder.
        last_step: that the checkpoint holds, -1 in a fresh run. Later TensorBoard events of an earlier sitting are hidden; W&B cannot take
            back what it was sent, and ignores the repeated lines, which say the same.
        config: of the run, shown by the trackers.
    """

    def __init__(self, names: tuple[str, ...], run_dir: Path, last_step: int, config: Mapping[str, Any]) -> None:
        self._trackers = [_MAKERS[name](run_dir, last_step) for name in names]
        for tracker in self._trackers:
            tracker.start()
            if (
                last_step < 0 and tracker.name == "wandb"
            ):  # TensorBoard would make a folder of each call; config.yaml stands beside it
                tracker.store_init_configuration(dict(config))

    def log(self, line: Mapping[str, Any]) -> None:
        """Hands on the numbers of a line; it must hold `step`."""
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=line["step"])

    def close(self) -> None:
        """Lets them finish what they have to write."""
        for tracker in self._trackers:
            tracker.finish()


def _tensorboard(run_dir: Path, last_step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", logging_dir=run_dir, purge_step=last_step + 1)


def _wandb(run_dir: Path, last_step: int) -> Any:
    from accelerate.tracking import WandBTracker

    path = run_dir / "wandb" / "run-id.txt"  # every sitting goes on with the same W&B run
    if last_step < 0 or not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    project = os.environ.get("WANDB_PROJECT", "mmctx")
    return WandBTracker(project, name=run_dir.name, id=path.read_text(), resume="allow", dir=str(run_dir))


_MAKERS: dict[str, Callable[[Path, int], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb}
