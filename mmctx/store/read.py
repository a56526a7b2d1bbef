"""Documents from what users have: shards, folders of files, tables of JSON lines, CSV or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmctx.datasets.build.folder import folder_source
from mmctx.datasets.build.members import LeftOut
from mmctx.datasets.build.rows import columns, read_rows, table_suffix
from mmctx.datasets.build.stream import ordered_map
from mmctx.datasets.build.table import Columns, table_source
from mmctx.datasets.build.writer import Source as BuildSource
from mmctx.datasets.shards.contents import check_texts, media_of, parse_json, parse_segments, read_text
from mmctx.datasets.shards.index import expand_shards, index_shards
from mmctx.datasets.shards.source import Source
from mmctx.errors import DataError, SampleError
from mmctx.store.entries import Document, Kind, Part

Found = Document | LeftOut
"""A document, or what cannot become one, and why."""


class Inputs:
    """Documents of one input.

    Args:
        where: a pattern of shards, a folder of files, or a table; see `mmctx data build folder` and `table` for their shapes.
        texts: of shards: members that hold texts, as in a run's config.
        chosen: columns of tables; the usual names by default, and `id` names the documents.
        by_path: keep where media lie instead of their bytes (shards only: `SHARD#KEY.EXTENSION`).
        prefix: what ids begin with, to tell inputs with equal keys apart.

    Raises:
        DataError: there is no such input.
        ConfigError: a column is not there.
    """

    def __init__(
        self,
        where: str,
        texts: tuple[str, ...] = ("txt",),
        chosen: Columns | None = None,
        by_path: bool = False,
        prefix: str = "",
    ) -> None:
        self.where, self._texts, self._by_path, self._prefix = where, check_texts(texts), by_path, prefix
        path = Path(where)
        self._shards: Source | None = None
        self._built: BuildSource | None = None
        if path.is_dir():
            self._built = folder_source(path)
        elif table_suffix(path) is not None:
            self._built = _table(path, chosen)
        else:
            self._shards = Source(where, list(index_shards(expand_shards(where), None, ())), ())
        if by_path and self._shards is None:
            raise DataError(
                f"{where}: media can be kept by path in shards alone; build shards first, or keep their bytes"
            )

    @property
    def total(self) -> int:
        """Documents at most; 0 where that is not known before they are read."""
        return self._shards.num_samples if self._shards is not None else (self._built.total if self._built else 0)

    def __iter__(self) -> Iterator[Found]:
        found = self._from_shards(self._shards) if self._shards is not None else self._from_build()
        for entry in found:
            yield replace(entry, id=self._prefix + entry.id) if isinstance(entry, Document) else entry

    def _from_shards(self, source: Source) -> Iterator[Found]:
        for number in range(source.num_samples):
            _, key = source.locate(number)
            try:
                raw = source.read(number)
                prefix = f"{raw.shard}#{raw.key}." if self._by_path else None
                yield document_of(raw.key, raw.members, self._texts, self.where, prefix)
            except SampleError as error:
                yield LeftOut(key, error.reason, error.detail)

    def _from_build(self) -> Iterator[Found]:
        assert self._built is not None
        yield from self._built.left_out
        with ordered_map(1) as render:
            for _, rendered in render(self._built.render, enumerate(self._built.items("train", 0))):
                yield from rendered.left_out
                if rendered.members is None:
                    continue
                members = {k: v.encode() if isinstance(v, str) else v for k, v in rendered.members.items()}
                key = members.pop("__key__").decode("utf-8", "surrogateescape")
                try:
                    yield document_of(key, members, ("txt",), self.where)
                except SampleError as error:
                    yield LeftOut(key, error.reason, error.detail)


def document_of(
    key: str, members: dict[str, bytes], texts: tuple[str, ...], source: str, prefix: str | None = None
) -> Document:
    """A document from the members of a sample: an interleaved one in its order, else picture, clip, texts.

    Args:
        key: names it.
        members: lower-cased extension -> bytes.
        texts: which of them, or of the facts in the json member, are texts.
        source: of the document.
        prefix: keep media by this path before their extension, not by their bytes.

    Raises:
        SampleError: it cannot be used.
    """
    facts = parse_json(members)
    segments = parse_segments(facts)
    media = media_of(members, segments)
    if segments is None:
        said = [text for entry in texts if (text := read_text(entry, members, facts)) is not None]
        parts = [*(_medium(s.kind, s.value, members, prefix) for s in media), *(Part("text", text) for text in said)]
    else:
        parts = [
            Part("text", s.value) if s.kind == "text" else _medium(s.kind, s.value, members, prefix)
            for s in segments
            if s.kind != "text" or s.value.strip()
        ]
    if not parts:
        raise SampleError("empty", f"no media and none of the texts {', '.join(texts)}; members: {', '.join(members)}")
    kept: Any = facts if isinstance(facts, dict) else {}
    return Document(key, tuple(parts), {name: value for name, value in kept.items() if name != "segments"}, source)


def _medium(kind: str, extension: str, members: dict[str, bytes], prefix: str | None) -> Part:
    own: Kind = "image" if kind == "image" else "audio"
    return Part(own, media=members[extension], path=None if prefix is None else prefix + extension)


def media_bytes(part: Part) -> bytes:
    """A picture's or clip's bytes, from the store or from where they lie.

    Raises:
        DataError: the shard is not there any more, or has no such sample.
    """
    if part.media is not None:
        return part.media
    shard, _, member = (part.path or "").partition("#")
    key, _, extension = member.partition(".")
    source, numbers = _opened(shard)
    if key not in numbers:
        raise DataError(f"{part.path}: the shard has no sample {key!r} any more; add it to the store again")
    found = source.read(numbers[key]).members.get(extension)
    if found is None:
        raise DataError(f"{part.path}: the sample has no member {extension!r} any more; add it to the store again")
    if Part(part.kind, media=found).content != part.content:
        raise DataError(f"{part.path}: not what was added to the store: the file has changed; add it again")
    return found


@lru_cache(maxsize=8)
def _opened(shard: str) -> tuple[Source, dict[str, int]]:
    source = Source(shard, list(index_shards(expand_shards(shard), None, ())), ())
    return source, {source.locate(number)[1]: number for number in range(source.num_samples)}


def _table(path: Path, chosen: Columns | None) -> BuildSource:
    """A table by its usual columns, with `id` or `key` as names; rows of JSON lines may have columns that the first one lacks."""
    names = columns(path)
    if table_suffix(path) not in (".csv", ".tsv", ".parquet"):
        names = list(dict.fromkeys(name for _, _, row in read_rows([path]) if isinstance(row, dict) for name in row))
    key = next((name for name in ("id", "key") if name in names), None)
    return table_source([path], chosen or Columns(key=key), present=names)


def read_ids(path: Path) -> list[str]:
    """Ids of a file: one a line, or JSON lines with `id`.

    Raises:
        DataError: a line of JSON has none.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("{"):
            row = json.loads(line)
            if not isinstance(row.get("id"), str):
                raise DataError(f"{path}: line {number}: expected a string under 'id', found {row.get('id')!r}")
            found.append(row["id"])
        elif line.strip():
            found.append(line.strip())
    return found
