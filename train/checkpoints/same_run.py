"""Whether a run may go on from a checkpoint: what of its configuration may have changed since."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mmctx.errors import CheckpointError
from mmctx.train.config import RunConfig
from mmctx.train.stages import find_changed_past

FREE_TO_CHANGE = (
    "run",
    "eval",
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.audit",
    "train.trackers",
    "train.peak_tflops",
    "train.guard",
    "train.num_threads",
    "train.activations",
    "train.compile",
    "train.sequence_parallel",
    "train.distribution",
    "train.deterministic",
    "data",
    "schedule",
    "model.transformer.attention",
)
"""Keys that a resumed run may set otherwise without becoming another run. `train.segments` knows what a change of `data` means; of
`schedule`, what has been trained may not change."""


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
