"""Shards from tables: JSON lines, CSV, TSV, Parquet, with columns of pictures, clips and texts."""

from __future__ import annotations

import base64
import binascii
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmctx.datasets.build.members import (
    LeftOut,
    Medium,
    Rendered,
    interleaved_sample,
    plain_sample,
    safe_key,
)
from mmctx.datasets.build.rows import Row, columns, count_rows, find_tables, hf_features, read_rows, stamp, table_suffix
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import ConfigError, SampleError

IMAGE_NAMES = ("image", "image_path", "jpg", "png", "picture")
AUDIO_NAMES = ("audio", "audio_path", "wav", "flac", "sound", "speech")
TEXT_NAMES = ("text", "caption", "txt", "transcription", "transcript", "sentence")
"""Columns that are taken where none is named."""


@dataclass(frozen=True)
class Columns:
    """Which column is what; all others go into the ``json`` member.

    Attributes:
        image: pictures: paths, bytes or ``{"bytes", "path"}``; a list of them makes an interleaved document.
        audio: clips, likewise.
        text: the text that becomes ``txt``.
        key: names the sample; file and row number by default.
        group: rows with the same value are held out together, such as several captions of one picture.
    """

    image: str | None = None
    audio: str | None = None
    text: str | None = None
    key: str | None = None
    group: str | None = None

    def check(self, present: Sequence[str], where: str) -> Columns:
        """These columns, those not named filled from the usual names.

        Raises:
            ConfigError: a named column is not there, or there is neither picture, clip nor text.
        """
        for name, column in asdict(self).items():
            if column is not None and column not in present:
                raise ConfigError(f"{where}: no column {column!r} for {name}; columns: {', '.join(present)}")
        usual = {"image": IMAGE_NAMES, "audio": AUDIO_NAMES, "text": TEXT_NAMES}
        chosen: dict[str, str | None] = {"key": self.key, "group": self.group}
        for name, names in usual.items():
            chosen[name] = getattr(self, name) or next((n for n in names if n in present), None)
        if not any(chosen[name] for name in usual):
            raise ConfigError(
                f"{where}: none of the columns {', '.join(present)} is known as picture, clip or text; name them with "
                "--image-column, --audio-column, --text-column"
            )
        return Columns(**chosen)


def build_table(
    sources: Sequence[Path],
    out: Path,
    chosen: Columns | None = None,
    *,
    media_root: Path | None = None,
    quotes: bool = True,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards from tables of one shape, in their order; see `build_shards` for what is written.

    Args:
        sources: tables, or folders of tables.
        chosen: which column is what.
        media_root: folder that paths are relative to; that of the table by default.
        quotes: of CSV and TSV files: a cell may stand in quotes. Tables without that rule have texts that begin with one.

    Raises:
        DataError: a table cannot be read, or nothing in it can be used.
        ConfigError: a column is not there.
    """
    source = table_source(sources, chosen, media_root=media_root, quotes=quotes)
    return build_shards(source, out, options or BuildOptions())


def table_source(
    sources: Sequence[Path],
    chosen: Columns | None = None,
    *,
    media_root: Path | None = None,
    quotes: bool = True,
    present: Sequence[str] | None = None,
) -> Source:
    """The samples of tables, see `build_table`; `present`: columns there are, if not those of the first row."""
    paths = find_tables(sources)
    chosen = with_hf_types(chosen or Columns(), paths[0]).check(present or columns(paths[0], quotes), str(paths[0]))

    prefixes = key_prefixes(paths)

    def items(split: str, start: int) -> Iterator[Item]:
        for path, number, row in read_rows(paths, start, quotes):
            where = f"{path}#{number}"
            if isinstance(row, SampleError):
                yield Item(where, LeftOut(where, row.reason, row.detail))
            else:
                yield row_item(row, chosen, f"{prefixes[path]}-{number:08d}", str(media_root or path.parent))

    return Source(
        kind="table",
        origin=", ".join(str(path.absolute()) for path in sources),
        recipe=[stamp(paths), asdict(chosen), ascii(media_root), quotes],
        items=items,
        render=functools.partial(render_row, columns=chosen),
        total=count_rows(paths),
        facts={"columns": {name: column for name, column in asdict(chosen).items() if column}},
    )


def with_hf_types(chosen: Columns, path: Path) -> Columns:
    """Columns that a Parquet file of the Hugging Face library marks as pictures and clips, where none is named."""
    if table_suffix(path) != ".parquet":
        return chosen
    return by_type(chosen, {name: feature_type(feature) for name, feature in hf_features(path).items()})


def by_type(chosen: Columns, types: Mapping[str, str | None]) -> Columns:
    """The first columns of the types Image and Audio, where none is named."""

    def first(kind: str) -> str | None:
        return next((name for name, found in types.items() if found == kind), None)

    return replace(chosen, image=chosen.image or first("Image"), audio=chosen.audio or first("Audio"))


def feature_type(feature: Any) -> str | None:
    """``Image``, ``Audio``, ``Value``, ... of a feature, or of what a list of them holds."""
    while isinstance(feature, list) or (
        isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList")
    ):
        feature = feature[0] if isinstance(feature, list) else feature.get("feature")
    return feature.get("_type") if isinstance(feature, dict) else None


def row_item(row: Row, chosen: Columns, fallback: str, media_root: str, split: str = "") -> Item:
    """The item of a row; its key is the key column's value, else `fallback`."""
    key = fallback
    if chosen.key is not None:
        value = row.get(chosen.key)
        if value is None or not str(value).strip("/"):
            line = LeftOut(fallback, "bad_key", f"column {chosen.key!r} holds {value!r}")
            return Item(fallback, line, split=split)
        key = str(value)
    group = f"{chosen.group}={row.get(chosen.group)}" if chosen.group is not None else ""
    return Item(safe_key(key), (row, media_root), group, split)


def render_row(item: Item, columns: Columns) -> Rendered:
    """The members of a row: a plain sample, or a document where a cell holds several media."""
    row, media_root = item.payload
    media: list[Medium] = []
    several = False
    of_kind: tuple[tuple[Literal["image", "audio"], str | None], ...] = (
        ("image", columns.image),
        ("audio", columns.audio),
    )
    for kind, column in of_kind:
        value = row.get(column) if column else None
        cells = value if isinstance(value, list) else [value]
        several |= isinstance(value, list)
        media += [medium_of(cell, kind, column or "", media_root) for cell in cells if cell not in (None, "")]
    text = row.get(columns.text) if columns.text else None
    if text is not None and not isinstance(text, str):
        raise SampleError("bad_text", f"column {columns.text!r} should hold text, found {type(text).__name__}")
    used = {columns.image, columns.audio, columns.text, columns.key}
    facts = {name: jsonable(value) for name, value in row.items() if name not in used and value is not None}
    if several:
        return interleaved_sample(item.key, [*media, *([text] if text else [])], facts)
    return plain_sample(item.key, media, text, facts)


def medium_of(cell: Any, kind: Literal["image", "audio"], column: str, media_root: str) -> Medium:
    """A picture or clip from a path, bytes, base64 text or ``{"bytes", "path"}``.

    Raises:
        SampleError: ``bad_cell``, or ``remote`` for an address on the net.
    """
    path: Any = None
    if isinstance(cell, Mapping) and {"bytes", "path"} & cell.keys():
        path, cell = cell.get("path"), cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes | bytearray | memoryview):
        return Medium(kind, str(path or column), data=bytes(cell))
    if not isinstance(cell, str) or not cell:
        found = f"column {column!r} should hold a path or bytes, found {type(cell).__name__}"
        raise SampleError("bad_cell", found)
    if cell.startswith("data:") and ";base64," in cell:
        try:
            return Medium(kind, column, data=base64.b64decode(cell.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise SampleError("bad_cell", f"column {column!r}: {error}") from None
    if "://" in cell:
        raise SampleError("remote", f"{cell}: not on this machine; fetch it and name the file")
    return Medium(kind, cell, path=str(Path(media_root, cell)))


def jsonable(value: Any) -> Any:
    """What of a value a ``json`` member can hold: bytes are replaced by their number, NaN and infinity by null."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes_left_out": len(value)}
    if isinstance(value, Mapping):
        return {str(name): jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def key_prefixes(paths: Sequence[Path]) -> dict[Path, str]:
    """What the keys of each table's rows begin with: its name, and its folder where tables lie in several."""
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    names = {path: os.path.relpath(path.absolute(), folder) for path in paths}
    return {path: name[: name.lower().rfind(table_suffix(path) or "")] for path, name in names.items()}
