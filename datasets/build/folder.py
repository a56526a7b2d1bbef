"""Shards from a folder of media files with captions: beside each file, or in one table of captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmctx.datasets.build.members import LeftOut, Medium, Rendered, interleaved_sample, kind_of, plain_sample, safe_key
from mmctx.datasets.build.rows import columns, read_rows, stamp, table_suffix
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.table import TEXT_NAMES, jsonable
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, listed, mix
from mmctx.datasets.shards.contents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, parse_segments
from mmctx.errors import ConfigError, DataError, SampleError

CAPTION_TABLES = ("captions", "metadata")
"""Names, without their suffix, of tables of captions; ``metadata`` is that of Hugging Face's ImageFolder and AudioFolder."""

# Formats that are copied as they are, in the order in which one is preferred to another.
_ORDER = {extension: place for place, extension in enumerate((*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS))}
_HINTS = {
    "m4a": "convert it: ffmpeg -i x.m4a x.flac",
    "aac": "convert it: ffmpeg -i x.aac x.flac",
    "wma": "convert it: ffmpeg -i x.wma x.flac",
    "mp4": "films are not read; take out what you need with ffmpeg",
    "heic": "convert it: heif-convert x.heic x.jpg",
    "svg": "draw it first: rsvg-convert x.svg -o x.png",
}


@dataclass
class _Files:
    """What lies in a folder."""

    media: list[Path] = field(default_factory=list)
    texts: dict[str, Path] = field(default_factory=dict)  # stem of a sidecar -> file
    facts: dict[str, Path] = field(default_factory=dict)
    tables: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The files of one sample; the caption, where a table gave it."""

    media: tuple[Medium, ...]
    text_file: str | None = None
    facts_file: str | None = None
    text: str | None = None
    facts: dict[str, Any] | None = None


def build_folder(
    folder: Path, out: Path, *, text_column: str | None = None, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Shards of the media below `folder`; see `build_shards` for what is written.

    With ``captions.csv`` (or ``.tsv``, ``.jsonl``, ``.parquet``, or ``metadata`` for ``captions``) somewhere in it, each
    row is a sample: ``file_name`` and other columns that end so name its media, relative to the table; `text_column` its
    text. Without, files that differ in their suffix alone are a sample: ``dog.jpg``, ``dog.wav``, ``dog.txt`` and facts
    in ``dog.json``. A ``story.json`` with ``segments`` is an interleaved document whose media are paths relative to it.

    Raises:
        DataError: there is no such folder, or nothing in it can be used.
        ConfigError: a table of captions lacks a column.
    """
    return build_shards(folder_source(folder, out, text_column), out, options or BuildOptions())


def folder_source(folder: Path, out: Path | None = None, text_column: str | None = None) -> Source:
    """The samples of a folder, see `build_folder`, leaving out what lies in `out`."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = _scan(folder, out)
    items = list(_rows(folder, files, text_column) if files.tables else _sidecars(folder, files))
    every = [*files.media, *files.texts.values(), *files.facts.values(), *files.tables]
    named = sorted((os.path.relpath(path, folder), *stamp([path])[0][1:]) for path in every)
    return Source(
        kind="folder",
        origin=ascii(str(folder.absolute())),
        recipe=[[ascii(name), size, time] for name, size, time in named] + [text_column],
        items=listed(mix(items)),
        render=render_pieces,
        total=len(items),
        costly=any(path.suffix[1:].lower() not in _ORDER for path in files.media),
        left_out=files.left_out,
    )


def _scan(folder: Path, out: Path | None) -> _Files:
    """Sorts all files by what their names promise. Shards that lie inside the folder are not read."""
    files = _Files()
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        files.left_out.append(LeftOut(_name(folder, Path(error.filename)), "unreadable_file", str(error.strerror)))

    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder that is read already, perhaps to one it lies in
            files.left_out.append(LeftOut(_name(folder, Path(parent)), "linked", "read under another name"))
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        files.left_out += [LeftOut(_name(folder, Path(parent, h)), "hidden", "a hidden folder") for h in hidden]
        inside = out and out.resolve()
        folders[:] = sorted(n for n in folders if n not in hidden and Path(parent, n).resolve() != inside)
        for name in sorted(names):
            _sort_in(folder, Path(parent, name), files)
    return files


def _sort_in(folder: Path, path: Path, files: _Files) -> None:
    suffix = path.suffix[1:].lower()
    if path.name.startswith("."):
        files.left_out.append(LeftOut(_name(folder, path), "hidden", "a hidden file"))
    elif not path.is_file():
        files.left_out.append(
            LeftOut(_name(folder, path), "unreadable_file", "a link that leads nowhere, or no plain file")
        )
    elif table_suffix(path) not in (None, ".json") and path.name.partition(".")[0].lower() in CAPTION_TABLES:
        files.tables.append(path)
    elif kind_of(path.name):
        files.media.append(path)
    elif suffix in ("txt", "json"):
        sidecars = files.texts if suffix == "txt" else files.facts
        if sidecars.setdefault(str(path.with_suffix("")), path) != path:
            detail = f"{sidecars[str(path.with_suffix(''))].name} is the {suffix} of this sample"
            files.left_out.append(LeftOut(_name(folder, path), "duplicate_member", detail))
    else:
        files.left_out.append(_unsupported(_name(folder, path), path))


def _unsupported(key: str, path: Path) -> LeftOut:
    suffix = path.suffix[1:].lower()
    return LeftOut(key, "unsupported_format", f".{suffix}: {_HINTS.get(suffix, 'neither picture, clip nor caption')}")


def _sidecars(folder: Path, files: _Files) -> Iterator[Item]:
    """Groups files by their path without suffix."""
    documents = {stem: path for stem, path in files.facts.items() if _is_document(path)}
    inside = {str(path) for document in documents.values() for path in _document_media(document)}
    for stem, path in documents.items():
        yield Item(safe_key(_name(folder, Path(stem))), str(path))
    groups: dict[str, list[Path]] = {}
    for path in files.media:
        if str(path) not in inside:
            groups.setdefault(str(path.with_suffix("")), []).append(path)
    for stem, paths in groups.items():
        if stem in documents:
            files.left_out += [
                LeftOut(_name(folder, p), "unused", f"{documents[stem].name} does not name it") for p in paths
            ]
            continue
        media = _one_of_each(folder, paths, files)
        text, facts = files.texts.get(stem), files.facts.get(stem)
        if len(media) < 2 and not text and not facts:
            detail = f"no caption: {Path(stem).name}.txt or .json beside it, or a row in captions.csv"
            files.left_out.append(LeftOut(_name(folder, paths[0]), "no_text", detail))
            continue
        pieces = _Pieces(media, text and str(text), facts and str(facts))
        yield Item(safe_key(_name(folder, Path(stem))), pieces)
    for sidecars in (files.texts, files.facts):
        for stem, path in sidecars.items():
            if stem in documents and path != documents[stem]:
                files.left_out.append(LeftOut(_name(folder, path), "unused", f"{documents[stem].name} is a document"))
            elif stem not in groups and stem not in documents:
                files.left_out.append(LeftOut(_name(folder, path), "no_media", "no picture or clip of this name"))


def _one_of_each(folder: Path, paths: list[Path], files: _Files) -> tuple[Medium, ...]:
    """At most one picture and one clip: the first by preference, others are left out."""
    chosen: dict[str, Medium] = {}
    for path in sorted(paths, key=lambda p: (_ORDER.get(p.suffix[1:].lower(), len(_ORDER)), p.name)):
        kind = kind_of(path.name) or "image"
        if kind in chosen:
            detail = f"{Path(chosen[kind].name).name} is the {kind} of this sample"
            files.left_out.append(LeftOut(_name(folder, path), "duplicate_member", detail))
        else:
            chosen[kind] = Medium(kind, _name(folder, path), path=str(path))
    return tuple(chosen.values())


def _rows(folder: Path, files: _Files, text_column: str | None) -> Iterator[Item]:
    """A sample for each row of each table; media that no row names are left out."""
    named: set[str] = set()
    seen: dict[str, int] = {}
    for table in files.tables:
        names = columns(table)
        media_columns = [name for name in names if name == "file_name" or name.endswith("_file_name")]
        chosen = text_column or next((name for name in TEXT_NAMES if name in names), None)
        if not media_columns or chosen not in names:
            missing = "file_name" if not media_columns else chosen or "text"
            raise ConfigError(
                f"{table}: no column {missing!r}; columns: {', '.join(names)}; name the text's by --text-column"
            )
        for _, number, row in read_rows([table]):
            where = f"{_name(folder, table)}#{number}"
            if isinstance(row, SampleError):
                files.left_out.append(LeftOut(where, row.reason, row.detail))
                continue
            paths = [table.parent / row[c] for c in media_columns if isinstance(row.get(c), str) and row[c]]
            if not paths:
                files.left_out.append(LeftOut(where, "no_media", f"nothing in {', '.join(media_columns)}"))
                continue
            named |= {os.path.normpath(path) for path in paths}
            stem = _name(folder, Path(os.path.normpath(paths[0])).with_suffix(""))
            seen[stem] = seen.get(stem, 0) + 1
            key = stem if seen[stem] == 1 else f"{stem}~{seen[stem]}"  # a picture with several captions
            if unknown := [p for p in paths if kind_of(p.name) is None]:
                files.left_out.append(_unsupported(f"{where}: {_name(folder, unknown[0])}", unknown[0]))
                continue
            media = tuple(Medium(kind_of(p.name) or "image", _name(folder, p), path=str(p)) for p in paths)
            used = {*media_columns, chosen}
            facts = {name: jsonable(value) for name, value in row.items() if name not in used and value is not None}
            pieces = _Pieces(media, text=str(row[chosen]) if row.get(chosen) is not None else "", facts=facts)
            yield Item(safe_key(key), pieces, group=stem)
    for path in files.media:
        if os.path.normpath(path) not in named:
            files.left_out.append(LeftOut(_name(folder, path), "no_text", "no row of the captions names it"))
    for path in (*files.texts.values(), *files.facts.values()):
        files.left_out.append(LeftOut(_name(folder, path), "unused", f"captions come from {files.tables[0].name}"))


def render_pieces(item: Item) -> Rendered:
    """The members of one sample of a folder."""
    if isinstance(item.payload, str):
        return _render_document(item.key, Path(item.payload))
    pieces: _Pieces = item.payload
    text, facts = pieces.text, pieces.facts
    if pieces.text_file is not None:
        text = _decode(Path(pieces.text_file))
    if pieces.facts_file is not None:
        content = _load_json(Path(pieces.facts_file))
        facts = content if isinstance(content, dict) else {"value": content}
    return plain_sample(item.key, pieces.media, text, facts)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("bad_text", f"{path.name}: {error}") from None
    except OSError as error:
        raise SampleError("unreadable_file", f"{path.name}: {error.strerror}") from None


def _load_json(path: Path) -> Any:
    try:
        return json.loads(_decode(path))
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{path.name}: {error}") from None


def _is_document(path: Path) -> bool:
    try:
        return parse_segments(_load_json(path)) is not None
    except SampleError as error:
        return "segment" in error.detail  # it wants to be one; rendering says what is wrong with it


def _document_media(path: Path) -> list[Path]:
    try:
        segments = _load_json(path)["segments"]
        return [_segment_path(path, v) for s in segments for k, v in s.items() if k in ("image", "audio")]
    except (SampleError, KeyError, TypeError, AttributeError):
        return []


def _segment_path(path: Path, value: str) -> Path:
    """``0.jpg`` of ``story.json`` is ``story.0.jpg`` beside it, as in a shard, or else a path relative to it."""
    beside = Path(f"{path.with_suffix('')}.{value}")
    return beside if beside.exists() else Path(os.path.normpath(path.parent / value))


def _render_document(key: str, path: Path) -> Rendered:
    content = _load_json(path)
    parse_segments(content)  # raises what the index would raise
    parts = []
    for segment in content["segments"]:
        ((kind, value),) = segment.items()
        parts.append(value if kind == "text" else Medium(kind, value, path=str(_segment_path(path, value))))
    return interleaved_sample(key, parts, {name: value for name, value in content.items() if name != "segments"})


def _name(folder: Path, path: Path) -> str:
    return os.path.relpath(path, folder)
