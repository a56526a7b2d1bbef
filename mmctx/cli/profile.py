"""`mmctx profile`: where the time of a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmctx.cli.common import Config, Json, Overrides, print_answer


def profile(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after two that warm up.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the trace.")] = Path("profile"),
    stage: Annotated[int, typer.Option(help="Of the run's schedule, counted from 1.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a few steps under PyTorch's profiler: a table of where their time goes, and a trace. Leaves no run behind."""
    from mmctx import api
    from mmctx.train.profile import profile_run

    answer = profile_run(api.load_config(config, *(overrides or [])), steps, out, stage)
    print_answer(answer, as_json, "" if as_json else _table(answer))


def _table(answer: dict[str, Any]) -> str:
    from rich.table import Table

    from mmctx.cli.tables import rendered

    on_device = answer["clock"] == "device"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for column in ("host ms", *(["device ms"] if on_device else []), "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in answer["parts"]:
        times = [part["host_ms"], *([part["device_ms"]] if on_device else [])]
        table.add_row(part["part"], *(f"{time:,.1f}" for time in times), f"{part['share']:.1%}")
    note = f"{answer['step_ms']:,.1f} ms a step, mean of {answer['steps']}; trace: {answer['trace']}"
    return rendered(table, note)
