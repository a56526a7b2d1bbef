"""The command `mmctx sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmctx.cli.common import Json, Overrides, print_answer, progress_bars


def sweep(
    config: Annotated[Path, typer.Argument(help="The sweep's YAML file.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Search for hyperparameters: each trial is an ordinary run. The same command goes on with a sweep that was stopped."""
    from mmctx.config import load_config
    from mmctx.train.sweep.config import SweepConfig
    from mmctx.train.sweep.study import sweep

    with progress_bars() as show:
        found = sweep(load_config(SweepConfig, config, overrides or []), show)
    print_answer(found, as_json, _text(found))
    if found["best"] is None:
        raise typer.Exit(1)


def _text(found: dict[str, Any]) -> str:
    """A line a trial, the best marked."""
    lines = []
    for trial in found["trials"]:
        value = f"{trial['value']:.5g}" if trial["value"] is not None else ""
        settings = "  ".join(f"{key}={_short(value)}" for key, value in trial["settings"].items())
        mark = "*" if trial == found["best"] else " "
        problem = f"  {trial['problem'].splitlines()[0]}" if trial["problem"] else ""
        lines.append(f"{mark} {trial['number']:>4}  {trial['state']:<9}{value:>10}  {settings}{problem}")
    best = found["best"]
    lines.append(
        f"best {found['metric']}: " + (f"{best['value']:.6g} in {found['dir']}/{best['folder']}" if best else "none")
    )
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
