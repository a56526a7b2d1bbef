"""Finding pictures by the names that records give them: in folders, in tars, by address."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmctx.datasets.build.members import Medium
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.table import medium_of
from mmctx.datasets.shards.tar import scan_tar
from mmctx.errors import ConfigError, DataError, SampleError


class PictureStore:
    """Pictures by name.

    Args:
        places: folders and plain tars to look in, in this order.
        base: folder that relative paths are tried against after all places.
        addresses: a table with the columns ``url`` and ``file``: where the picture of each address was put.

    Raises:
        DataError: a place is missing, or a tar is damaged.
        ConfigError: the table of addresses lacks a column.
    """

    def __init__(self, places: Sequence[Path], base: Path, addresses: Path | None = None) -> None:
        self._folders: list[Path] = []
        self._members: dict[str, tuple[str, int, int]] = {}
        self._files = dict(_read_addresses(addresses)) if addresses else {}
        for place in places:
            if place.is_dir():
                self._folders.append(place)
            elif place.is_file():
                for member in scan_tar(place):
                    where = (str(place), member.offset, member.size)
                    self._members.setdefault(member.name.removeprefix("./"), where)
            else:
                raise DataError(f"{place}: no such folder or tar of pictures")
        self._folders.append(base)
        tars = sorted({path for path, _, _ in self._members.values()})
        listed = [Path(path) for path in tars] + ([addresses] if addresses else [])
        self.recipe: list[Any] = [[str(folder) for folder in self._folders], stamp(listed)]

    def find(self, name: str) -> Medium | None:
        """The picture that a record calls `name`: a path, or an address of the net.

        An address is looked up in the table of addresses, else as ``host/path``, as ``wget --force-directories`` puts it. The
        last part of an address alone is no name: many pages have their own ``logo.png``.
        """
        known = self._files.get(name)
        if known is None and "://" in name:
            parts = urlsplit(name)
            known = f"{parts.netloc}{parts.path}" + (f"?{parts.query}" if parts.query else "")
        known = (known or name).removeprefix("./")
        if known in self._members:
            path, offset, size = self._members[known]
            return Medium("image", name, path=path, span=(offset, size))
        for folder in self._folders:
            path = os.path.join(folder, known)
            if os.path.isfile(path):
                return Medium("image", name, path=path)
        return None

    def resolve(self, cell: Any) -> Medium:
        """The picture of a record's cell: a name, bytes, or ``{"bytes", "path"}``.

        Raises:
            SampleError: ``missing_file`` with what was looked for, ``bad_cell``.
        """
        if isinstance(cell, Mapping) and cell.get("bytes") is None and isinstance(cell.get("path"), str):
            cell = cell["path"]
        if not isinstance(cell, str) or cell.startswith("data:"):
            return medium_of(cell, "image", "images", ".")
        found = self.find(cell)
        if found is None:
            where = ", ".join([*map(str, self._folders), *(["the tars"] if self._members else [])])
            raise SampleError("missing_file", f"{cell}: not in {where}")
        return found


def _read_addresses(path: Path) -> list[tuple[str, str]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            if not {"url", "file"} <= set(reader.fieldnames or ()):
                raise ConfigError(f"{path}: expected the columns url and file, found {reader.fieldnames}")
            return [(row["url"], row["file"]) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
