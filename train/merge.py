"""`mmctx merge`: a tuned checkpoint as one without a tuning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmctx.errors import ConfigError
from mmctx.train.checkpoints.files import read_json, write_json
from mmctx.train.checkpoints.layout import resolve_checkpoint
from mmctx.train.checkpoints.load import WEIGHTS, read_model
from mmctx.train.checkpoints.manifest import COMPLETE, MANIFEST, OPTIMIZER, about, seal
from mmctx.train.optim.ema import EMA_FILE
from mmctx.tuning import merge, without_tuning

_LEFT = ("adapter", OPTIMIZER, f"trainer/{EMA_FILE}", MANIFEST, COMPLETE)
"""What belongs to the tuned model alone."""


def merge_checkpoint(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes a checkpoint whose weights hold what LoRA or AdaLoRA added, with the same outputs up to rounding; the old one stays.

    Args:
        checkpoint: a `checkpoint-N` folder, or a run folder for its newest one.
        out: a folder that does not exist yet. It can be evaluated, and started from; a run does not go on from it.

    Returns:
        `checkpoint`, `merged` and the `kind` of its tuning.

    Raises:
        ConfigError: there is nothing to merge, it cannot be merged, or `out` exists.
    """
    folder = resolve_checkpoint(checkpoint)
    model, _, _ = read_model(folder)
    if out.exists():
        raise ConfigError(f"{out}: exists already; name a folder that does not")
    if model.tuning is None:
        raise ConfigError(f"{folder}: was trained without a tuning, so there is nothing to merge")
    kind = model.tuning.kind
    merge(model)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial, ignore=lambda path, names: _left(folder, Path(path), names))
    description = read_json(partial / "config.json")
    description["run"] = without_tuning(description["run"])
    write_json(partial / "config.json", description)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, partial / WEIGHTS, {"format": "pt"})
    seal(partial, about(folder))
    partial.rename(out)
    return {"checkpoint": str(folder), "merged": str(out), "kind": kind}


def _left(folder: Path, path: Path, names: list[str]) -> list[str]:
    return [name for name in names if (path / name).relative_to(folder).as_posix() in _LEFT]
