"""What a run leaves its caller with."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        run_dir: the run's folder.
        step: steps done in all.
        wish: the signal that stopped it before the last step, if one did.
        train_seconds: time spent in the loop, earlier sittings included.
        is_main_process: False on all ranks but one.
    """

    run_dir: Path
    step: int
    wish: signal.Signals | None
    train_seconds: float
    is_main_process: bool

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped it before the last step."""
        return self.wish is not None
