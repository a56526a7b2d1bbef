"""Files that are on the disk when they say so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmctx.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:  # a flipped byte may not even be UTF-8
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """One JSON object, for people to read as well."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False))


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
