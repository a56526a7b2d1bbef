"""Rows of JSON-lines, CSV, TSV and Parquet files, one at a time, from any row on."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from mmctx.errors import DataError, SampleError

Row = dict[str, Any]

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_PACKED = (".gz", ".zip")
_PARQUET_BATCH = 64  # rows decoded at once: pictures may lie in them


def table_suffix(path: Path) -> str | None:
    """``.csv`` for ``x.csv`` and ``x.csv.gz``; None for what is no table."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    suffix = Path(name).suffix
    return suffix if suffix in TABLE_SUFFIXES else None


def find_tables(sources: Sequence[Path]) -> list[Path]:
    """The tables that `sources` name: files as they are, folders by what lies in them, in order of name.

    Raises:
        DataError: a source is missing or holds no table.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(p for p in source.rglob("*") if p.is_file() and table_suffix(p) not in (None, ".json"))
            if not inside:
                raise DataError(f"{source}: holds none of {', '.join(TABLE_SUFFIXES)}")
            found += inside
        elif not source.is_file():
            raise DataError(f"{source}: no such file or folder")
        elif table_suffix(source) is None:
            raise DataError(f"{source}: expected one of {', '.join(TABLE_SUFFIXES)}")
        else:
            found.append(source)
    return found


def read_rows(
    paths: Sequence[Path], start: int = 0, quotes: bool = True
) -> Iterator[tuple[Path, int, Row | SampleError]]:
    """(file, number in the file, row) of all rows of all files from row `start` on; a broken row is a `SampleError`.

    Without `quotes`, quotes in CSV and TSV files are letters like others.

    Raises:
        DataError: a file cannot be read.
    """
    for path in paths:
        if table_suffix(path) == ".parquet":
            file = _open_parquet(path)
            rows, skipped = _parquet_rows(file, start), min(start, file.metadata.num_rows)
        else:
            rows, skipped = _text_rows(path, quotes), 0
            if start:  # rows must be walked over: quotes may hold line ends
                skipped = sum(1 for _ in itertools.islice(rows, start))
        start -= skipped
        yield from ((path, number, row) for number, row in enumerate(rows, skipped))


def columns(path: Path, quotes: bool = True) -> list[str]:
    """Names of a table's columns; of a JSON-lines file, those of its first row.

    Raises:
        DataError: it cannot be read, or holds no row.
    """
    if table_suffix(path) == ".parquet":
        return list(_open_parquet(path).schema_arrow.names)
    for _, _, row in read_rows([path], quotes=quotes):
        if isinstance(row, dict):
            return list(row)
    raise DataError(f"{path}: holds no row that can be read")


def count_rows(paths: Sequence[Path]) -> int:
    """Rows of all files where Parquet tells; 0 where they would have to be read."""
    if any(table_suffix(path) != ".parquet" for path in paths):
        return 0
    return sum(_open_parquet(path).metadata.num_rows for path in paths)


def hf_features(path: Path) -> dict[str, Any]:
    """Columns and their Hugging Face types, as that library notes them in Parquet files; {} where it wrote none."""
    metadata = _open_parquet(path).schema_arrow.metadata or {}
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def stamp(paths: Sequence[Path]) -> list[list[Any]]:
    """Names, sizes and times of files: what a recipe notes to see that they changed."""
    stats = [path.stat() for path in paths]
    return [[ascii(path.name), stat.st_size, stat.st_mtime_ns] for path, stat in zip(paths, stats, strict=True)]


def pyarrow_parquet() -> ModuleType:
    """Raises `DataError` with the remedy where pyarrow is not installed."""
    try:
        import pyarrow.parquet

        return pyarrow.parquet
    except ImportError:
        raise DataError("Parquet files need the package pyarrow: pip install 'mmctx[tables]'") from None


def _open_parquet(path: Path) -> Any:
    parquet = pyarrow_parquet()
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises several types on damaged files
        raise DataError(f"{path}: no readable Parquet file ({error}); copy or write it again") from None


def _parquet_rows(file: Any, start: int) -> Iterator[Row]:
    """Row groups before `start` are not read."""
    groups = []
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if start >= size and not groups:
            start -= size
        else:
            groups.append(group)
    if groups:
        batches = file.iter_batches(batch_size=_PARQUET_BATCH, row_groups=groups)
        yield from itertools.islice((row for batch in batches for row in batch.to_pylist()), start, None)


def _text_rows(path: Path, quotes: bool) -> Iterator[Row | SampleError]:
    suffix = table_suffix(path)
    try:
        with _open_text(path) as file:
            if suffix == ".json":
                yield from _json_rows(file, path)
            elif suffix in (".csv", ".tsv"):
                yield from _csv_rows(file, "," if suffix == ".csv" else "\t", quotes, path)
            else:
                for line in file:
                    if line.strip():
                        yield _json_row(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except csv.Error as error:
        raise DataError(f"{path}: {error}; if its quotes are letters like others, say --no-quotes") from None
    except (UnicodeDecodeError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it again as UTF-8") from None


def _json_row(line: str) -> Row | SampleError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError("bad_row", f"{error}")
    return row if isinstance(row, dict) else SampleError("bad_row", f"expected an object, found {type(row).__name__}")


def _json_rows(file: IO[str], path: Path) -> Iterator[Row | SampleError]:
    """A whole JSON file: a list of objects, or one object."""
    try:
        content = json.load(file)
    except ValueError as error:
        raise DataError(f"{path}: {error}; JSON lines should be named .jsonl") from None
    for row in content if isinstance(content, list) else [content]:
        yield (
            row if isinstance(row, dict) else SampleError("bad_row", f"expected an object, found {type(row).__name__}")
        )


def _csv_rows(file: IO[str], delimiter: str, quotes: bool, path: Path) -> Iterator[Row | SampleError]:
    csv.field_size_limit(1 << 30)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
    if not reader.fieldnames:
        raise DataError(f"{path}: expected column names in the first line, found none")
    width = len(reader.fieldnames)
    for row in reader:
        if None in row or None in row.values():
            found = width + len(row[None]) if None in row else sum(v is not None for v in row.values())
            yield SampleError("bad_row", f"line {reader.line_num}: expected {width} fields, found {found}")
        else:
            yield dict(row)


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    """UTF-8 with or without its mark; inside ``.gz``, and the one file inside ``.zip``, too."""
    options: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    suffix = path.suffix.lower()
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise DataError(f"{path}: expected one file inside, found {len(names)}; unpack it")
            with archive.open(names[0]) as file:
                yield io.TextIOWrapper(file, **options)
    elif suffix == ".gz":
        with gzip.open(path, "rt", **options) as file:
            yield file  # type: ignore[misc]
    else:
        with path.open("r", **options) as file:
            yield file
