"""Shards from long text files, one document a file or a part of it."""

from __future__ import annotations

import functools
import gzip
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mmctx.datasets.build.html import read_page
from mmctx.datasets.build.members import LeftOut, Rendered, plain_sample, safe_key
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import ConfigError, DataError, SampleError

SUFFIXES = (".txt", ".text", ".md", ".rst", ".html", ".htm", ".xhtml")

Cut = Literal["file", "form-feed", "heading"]

_CUTS = {"form-feed": re.compile("\f"), "heading": re.compile(r"^(?=#{1,2} )", re.MULTILINE)}


def build_text(
    sources: Sequence[Path],
    out: Path,
    *,
    cut: Cut = "file",
    encoding: str = "utf-8",
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards of texts; see `build_shards` for what is written. Parts of one file are held out together.

    Args:
        sources: files, or folders of files, gzipped or not; of HTML, what it says.
        cut: whole files, or parts between form feeds or that begin with a Markdown heading of level 1 or 2.
        encoding: of the files.

    Raises:
        DataError: a source is not there, or holds no text.
        ConfigError: there is no such cut or encoding.
    """
    if cut not in ("file", *_CUTS):
        raise ConfigError(f"cut should be file, {' or '.join(_CUTS)}, found {cut!r}")
    try:
        "".encode(encoding)
    except LookupError:
        raise ConfigError(f"encoding: Python knows no {encoding!r}") from None
    left_out: list[LeftOut] = []
    files = _find(sources, left_out)
    source = Source(
        kind="text",
        origin=ascii(", ".join(str(path.absolute()) for path in sources)),
        recipe=[stamp([path for _, path in files]), [ascii(name) for name, _ in files], cut, encoding],
        items=functools.partial(_items, files, cut, encoding),
        render=_render,
        total=len(files) if cut == "file" else 0,
        left_out=left_out,
        facts={"files": len(files)},
    )
    return build_shards(source, out, options or BuildOptions())


def _find(sources: Sequence[Path], left_out: list[LeftOut]) -> list[tuple[str, Path]]:
    """(name, path) of every text file; names are relative to the folder given, so that they survive its move."""
    found = []
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder")
        paths = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
        for path in paths:
            name = os.path.relpath(path, source if source.is_dir() else source.parent)
            if _suffix(path) in SUFFIXES or path == source:
                found.append((name, path))
            else:
                left_out.append(
                    LeftOut(name, "unsupported_format", f"expected {', '.join(SUFFIXES)}, perhaps with .gz")
                )
    return found


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def _items(files: Sequence[tuple[str, Path]], cut: Cut, encoding: str, split: str, start: int) -> Iterator[Item]:
    """The parts of all files; with whole files, those before `start` are not read."""
    skip = start if cut == "file" else 0
    number = skip
    for name, path in files[skip:]:
        key = safe_key(name.removesuffix(".gz").removesuffix(".txt"))
        try:
            text = read_document(path, encoding)
            parts = [text] if cut == "file" else [part for part in _CUTS[cut].split(text) if part.strip()] or [text]
        except SampleError as error:
            parts = [LeftOut(name, error.reason, error.detail)]
        for place, part in enumerate(parts):
            if number >= start:
                yield Item(key if len(parts) == 1 else f"{key}/{place:05d}", part, group=key)
            number += 1


def read_document(path: Path, encoding: str = "utf-8") -> str:
    """A file as text, with line ends as ``\\n``.

    Raises:
        SampleError: ``unreadable_file``, ``bad_text``.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
        text = data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except (OSError, EOFError) as error:
        raise SampleError("unreadable_file", f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise SampleError("bad_text", f"{path}: {error}; name its encoding") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _suffix(path) in (".html", ".htm", ".xhtml"):
        return "".join(part if isinstance(part, str) else "\n" for part in read_page(text).parts)
    return text


def _render(item: Item) -> Rendered:
    return plain_sample(item.key, [], item.payload)
