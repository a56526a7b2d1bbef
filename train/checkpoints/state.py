"""Everything a run is besides weights and optimizer: `trainer_state.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.files import read_json
from mmctx.train.optim.guard import GuardState


@dataclass
class TrainerState:
    """Of the data the step is enough, with the segments of the plan so far.

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


def read_state(checkpoint: Path) -> TrainerState:
    """The `trainer_state.json` of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another version of mmctx.
    """
    path = checkpoint / "trainer" / "trainer_state.json"
    try:
        tree = read_json(path)
        tree["guard"] = GuardState(**tree["guard"])
        return TrainerState(**tree)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: written by another version of mmctx ({error}); set run.name to start a new run"
        ) from None
