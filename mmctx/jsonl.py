"""Reading files of one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file, none if there is no file; a last line cut short by a kill is left out."""
    return list(each_line(path))


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """As `read_lines`, one object after the other: a long run's file is larger than what is kept of it."""
    if not path.exists():
        return
    with path.open(newline="\n") as file:  # JSON strings may hold other line separators
        for line in file:
            if line == "\n":
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
