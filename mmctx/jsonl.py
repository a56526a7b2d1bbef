"""Reading files of one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file, none if there is no file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().split("\n"):  # not splitlines: JSON strings may hold other line separators
        if not line:
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
