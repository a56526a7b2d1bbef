"""Shards from what the Hugging Face `datasets` library leaves on the disk: `save_to_disk` folders and Parquet folders."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmctx.datasets.build.members import LeftOut
from mmctx.datasets.build.rows import Row, columns, count_rows, hf_features, read_rows, stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.table import Columns, by_type, feature_type, render_row, row_item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import DataError, SampleError

_SHARD_NAME = re.compile(r"(?:^|/)([A-Za-z]\w*)-\d+-of-\d+[^/]*\.parquet$")
_BATCH = 64


def build_hf(
    folder: Path, out: Path, chosen: Columns | None = None, *, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Shards of a dataset on the disk, split as it is; see `build_shards` for what is written.

    Columns of type Image and Audio are taken as they are stored, undecoded; class labels go into the ``json`` member
    by name. A column of several pictures or clips makes interleaved documents.

    Raises:
        DataError: the folder holds no dataset, or the library to read it is missing.
        ConfigError: a column is not there.
    """
    data = _Parquet(folder) if _is_parquet(folder) else _Saved(folder)
    types = {name: feature_type(feature) for name, feature in data.features.items()}
    chosen = by_type(chosen or Columns(), types).check(data.columns, str(folder))
    labels = {
        name: f["names"] for name, f in data.features.items() if types[name] == "ClassLabel" and isinstance(f, dict)
    }
    one = data.splits == ("",)

    def items(split: str, start: int) -> Iterator[Item]:
        for number, row in enumerate(data.rows("" if one else split, start), start):
            key = f"{split if not one else 'row'}-{number:08d}"
            if isinstance(row, SampleError):
                yield Item(key, LeftOut(key, row.reason, row.detail), split=split)
            else:
                yield row_item(_named(row, labels), chosen, key, str(folder), split="" if one else split)

    source = Source(
        kind="hf",
        origin=ascii(str(folder.absolute())),
        recipe=[stamp(data.files), asdict(chosen)],
        items=items,
        render=functools.partial(render_row, columns=chosen),
        total=max(data.sizes.values()),
        splits=() if one else data.splits,
        facts={"columns": {name: column for name, column in asdict(chosen).items() if column}},
    )
    return build_shards(source, out, options or BuildOptions())


class _Saved:
    """What `save_to_disk` wrote: one dataset, or one for each split. Memory-mapped, nothing is decoded."""

    def __init__(self, folder: Path) -> None:
        try:
            import datasets  # Hugging Face's: our folder of this name carries no __init__.py, so it never shadows it
        except ImportError:
            raise DataError("datasets on the disk need the package datasets: pip install 'mmctx[hf]'") from None
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (FileNotFoundError, NotADirectoryError):
            found = "it holds neither dataset_info.json, dataset_dict.json nor Parquet files"
            raise DataError(f"{folder}: no Hugging Face dataset; {found}") from None
        parts: dict[str, Any] = {str(n): d for n, d in loaded.items()} if isinstance(loaded, dict) else {"": loaded}
        # As Arrow tables, media columns come as they are stored; no decoder has to be installed.
        self._parts = {name: part.with_format("arrow") for name, part in parts.items()}
        first = next(iter(parts.values()))
        self.features: dict[str, Any] = first.features.to_dict()
        self.columns: list[str] = list(first.column_names)
        self.splits = tuple(parts)
        self.sizes = {name: len(part) for name, part in parts.items()}
        self.files = sorted(path for path in folder.rglob("*") if path.suffix in (".arrow", ".json"))

    def rows(self, split: str, start: int) -> Iterator[Row | SampleError]:
        part = self._parts[split]
        for begin in range(start, len(part), _BATCH):
            yield from part[begin : min(begin + _BATCH, len(part))].to_pylist()


class _Parquet:
    """A folder of Parquet files, named by split as the hub does (``train-00000-of-00002.parquet``) or not."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.parquet"))
        matches = {path: _SHARD_NAME.search(path.as_posix()) for path in self.files}
        named = all(matches.values())
        self._paths: dict[str, list[Path]] = {}
        for path, match in matches.items():
            self._paths.setdefault(match[1] if named and match else "", []).append(path)
        self.features = hf_features(self.files[0])
        self.columns = columns(self.files[0])
        self.splits = tuple(self._paths)
        self.sizes = {name: count_rows(paths) for name, paths in self._paths.items()}

    def rows(self, split: str, start: int) -> Iterator[Row | SampleError]:
        return (row for _, _, row in read_rows(self._paths[split], start))


def _is_parquet(folder: Path) -> bool:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    saved = any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    return not saved and any(True for _ in itertools.islice(folder.rglob("*.parquet"), 1))


def _named(row: Row, labels: Mapping[str, list[str]]) -> Row:
    """The row with class labels by name; -1 stands for none."""
    found = {name: row[name] for name in labels if isinstance(row.get(name), int)}
    return row | {name: labels[name][n] if 0 <= n < len(labels[name]) else None for name, n in found.items()}
