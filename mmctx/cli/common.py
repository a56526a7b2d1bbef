"""What every command shares: `--json`, progress bars on stderr, answers on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Config = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=1000.")]


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that draws a bar for each stage, on stderr, where a terminal is attached."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show


def print_answer(answer: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints what a command found on stdout: `answer` as one JSON object, or `text` for people."""
    print(json.dumps(answer) if as_json else text)  # ASCII alone: keys of tars may be any bytes


def table(answer: dict[str, Any], indent: str = "") -> str:
    """Nested dicts as aligned lines."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}", table(value, indent + "  ")]
        else:
            shown = "none" if value in ({}, []) else str(value)
            if isinstance(value, int | float):
                shown = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
            lines.append(f"{indent}{key:<{max(1, 28 - len(indent))}} {shown}")
    return "\n".join(line for line in lines if line)
