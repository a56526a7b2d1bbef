"""WebDataset shards with the same bytes every time, and the record that tells which of them are whole.

A file appears under its final name only when complete. `Manifest` (``build.json``) remembers size, sha256 and recipe of
every file, so a second build redoes what is missing, damaged or made by another recipe, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmctx.errors import DataError

SCHEMA = 1


def write_shard(path: Path, samples: Iterable[dict[str, str | bytes]]) -> int:
    """Writes ``samples`` (``__key__`` and one entry a member) as a tar through webdataset; returns how many there were.

    The bytes depend on the samples alone: no time, owner or mode of this machine enters.
    """
    from webdataset.writer import (
        TarWriter,
    )  # here, not above: it imports torch, which a build that skips can do without

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    count = 0
    with temporary.open("wb") as stream:
        with TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for sample in samples:
                writer.write(sample)
                count += 1
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    return count


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of one tar in order: ``__key__`` and the bytes of each member."""
    from webdataset.compat import WebDataset

    yield from WebDataset(str(path), shardshuffle=False)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary folder, then puts it in the place of ``path``."""
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)


class Manifest:
    """Size, sha256, recipe and number of samples of each built file, kept in ``build.json``.

    A recipe is whatever JSON value decides the bytes of a file: a file made by another one counts as not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "build.json"
        self.files: dict[str, dict[str, Any]] = {}
        self.header: dict[str, Any] = {}
        if self.path.exists():
            try:
                record = json.loads(self.path.read_text())
            except ValueError:
                record = {}  # cut short by a crash of the machine: everything is built again
            if record.pop("schema", None) == SCHEMA:
                self.files = record.pop("files")
                self.header = record

    def claim(self, **identity: Any) -> None:
        """Notes what is built here, such as ``kind``; nothing of another build is overwritten, for its data may be gone.

        Raises:
            DataError: the folder holds files of a build with another identity.
        """
        found = {key: self.header.get(key) for key in identity}
        if self.files and found != identity:
            before = " ".join(str(value) for value in found.values() if value) or "another build"
            now = " ".join(str(value) for value in identity.values() if value) or "this build"
            raise DataError(f"{self.root}: holds {before}, not {now}; choose another folder or remove this one")
        self.header = {key: value for key, value in identity.items() if value is not None}

    def is_whole(self, name: str, recipe: Any) -> bool:
        """True if the file ``name`` (relative to the root) is there, unharmed and made by ``recipe``."""
        known, path = self.files.get(name), self.root / name
        return (
            known is not None
            and known["recipe"] == fingerprint(recipe)
            and path.is_file()
            and path.stat().st_size == known["size"]
            and sha256(path) == known["sha256"]
        )

    def record(self, name: str, recipe: Any, samples: int = 0, **facts: Any) -> None:
        """Remembers the file as it now stands, and saves, so that an interrupted build keeps what it has finished.

        `facts` are whatever else is to be known of the file without reading it.
        """
        path = self.root / name
        self.files[name] = {
            "size": path.stat().st_size,
            "sha256": sha256(path),
            "samples": samples,
            "recipe": fingerprint(recipe),
            **facts,
        }
        self.save(self.header)

    def drop_all_but(self, names: Iterable[str]) -> list[str]:
        """Deletes files of earlier builds that are not among ``names``; returns them. Other people's files are safe."""
        stale = sorted(set(self.files) - set(names))
        for name in stale:
            del self.files[name]
            (self.root / name).unlink(missing_ok=True)
        return stale

    def save(self, header: dict[str, Any]) -> None:
        """Writes ``build.json`` in one step: ``header`` and the files in order of name."""
        self.header = header
        files = {name: self.files[name] for name in sorted(self.files)}
        record = {"schema": SCHEMA, **header, "files": files}
        text = json.dumps(record, indent=1) + "\n"  # ASCII: a header may name files, whose names may be any bytes
        temporary = self.path.with_name(self.path.name + ".partial")
        temporary.write_text(text)
        temporary.replace(self.path)


def fingerprint(recipe: Any) -> str:
    """A short digest of a JSON value."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Digest of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); remove it and build again") from None
