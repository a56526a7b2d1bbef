"""Finding sets that Debian packages install."""

from __future__ import annotations

from pathlib import Path

from mmctx.errors import DataError


def installed(path: Path, package: str) -> Path:
    """`path`, which `package` installs.

    Raises:
        DataError: it is not there; the message names the package.
    """
    if not path.exists():
        raise DataError(f"{path}: not found; apt-get install {package}, or say where its files lie with --from")
    return path
