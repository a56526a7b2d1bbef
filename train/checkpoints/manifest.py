"""What a checkpoint consists of: the size and the hash of each file, written when it is made and compared when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmctx.errors import CheckpointError
from mmctx.train.checkpoints.files import flush, read_json, write_json

MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
OPTIMIZER = "trainer/optimizer"
"""Folder, within a checkpoint, of what only a run that goes on needs."""
CARD = "README.md"
"""The model card. It is no part of the manifest: evaluations renew it, and people write into it."""
_SHOWN = 12


def seal(folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Writes `manifest.json` over all files of a folder, flushes everything to the disk, and writes COMPLETE last.

    Args:
        folder: whose files are all there.
        about: what else the manifest is to hold.
    """
    for old in (folder / COMPLETE, folder / MANIFEST):
        old.unlink(missing_ok=True)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _hash(path)}
    write_json(folder / MANIFEST, {**(about or {}), "files": files})
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        flush(path)
    (folder / COMPLETE).write_text(_hash(folder / MANIFEST) + "\n")
    flush(folder / COMPLETE)
    flush(folder)


def verify(checkpoint: Path, optimizer: bool = True) -> None:
    """Compares a checkpoint with its manifest.

    Args:
        checkpoint: its folder.
        optimizer: look at the optimizer's state, too; an evaluation does not need it.

    Raises:
        CheckpointError: it is not whole; the first file that is not as it was written is named.
    """
    if not (checkpoint / COMPLETE).exists():
        raise CheckpointError(f"{checkpoint}: not whole, it has no file {COMPLETE}; {_remedy(checkpoint)}")
    written = (checkpoint / COMPLETE).read_bytes().decode("ascii", "replace").strip()
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        raise CheckpointError(f"{manifest}: missing; {_remedy(checkpoint)}")
    if (found := _hash(manifest)) != written:
        raise CheckpointError(_differs(checkpoint, manifest, written, found))
    for name, file in read_json(manifest)["files"].items():
        path = checkpoint / name
        if not optimizer and name.startswith(f"{OPTIMIZER}/"):
            continue
        if not path.exists():
            raise CheckpointError(f"{path}: missing; {_remedy(checkpoint)}")
        if (size := path.stat().st_size) != file["size"]:
            raise CheckpointError(
                f"{path}: has {size:,} bytes, was written with {file['size']:,}; {_remedy(checkpoint)}"
            )
        if (found := _hash(path)) != file["sha256"]:
            raise CheckpointError(_differs(checkpoint, path, file["sha256"], found))


def about(checkpoint: Path) -> dict[str, Any]:
    """What `seal` was told of a checkpoint."""
    return {key: value for key, value in read_json(checkpoint / MANIFEST).items() if key != "files"}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differs(checkpoint: Path, path: Path, written: str, found: str) -> str:
    hashes = f"its sha256 is {found[:_SHOWN]}..., it was written with {written[:_SHOWN]}..."
    return f"{path}: damaged, {hashes}; {_remedy(checkpoint)}"


def _remedy(checkpoint: Path) -> str:
    return f"restore it from a copy, or delete {checkpoint} to fall back to the checkpoint before it"
