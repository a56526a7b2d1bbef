"""Interleaved documents of Megatron-Energon: tars whose ``KEY.json`` holds parallel lists of texts and members."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmctx.datasets.build.members import LeftOut, Medium, Rendered, interleaved_sample
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import Source
from mmctx.datasets.shards.tar import group_samples, parse_members, scan_tar
from mmctx.errors import DataError, SampleError

Part = str | Medium | LeftOut

_SPLIT = Path(".nv-meta", "split.yaml")


def energon_source(sources: Sequence[Path]) -> Source:
    """The samples of tars, or of a dataset folder, whose ``.nv-meta/split.yaml`` says which split each tar belongs to.

    Raises:
        DataError: a source is missing, or its split names what is not there.
    """
    if len(sources) == 1 and (sources[0] / _SPLIT).is_file():
        tars, excluded = _read_split(sources[0])
    else:
        tars, excluded = {"": [path for source in sources for path in _tars(source)]}, frozenset()

    def items(split: str, start: int) -> Iterator[Item]:
        paths = tars.get(split, tars.get("", []))
        samples = ((path, sample) for path in paths for sample in group_samples(scan_tar(path)))
        for number, (path, sample) in enumerate(samples):
            if number >= start:
                named = f"{path}/{sample.key}" in excluded
                line = LeftOut(sample.key, "excluded", f"by {_SPLIT}") if named else None
                yield Item(sample.key, line or (str(path), sample.start, sample.end), split=split)

    every = [path for paths in tars.values() for path in paths]
    whole = [LeftOut(str(path), "excluded", f"by {_SPLIT}") for path in sorted(excluded) if path.endswith(".tar")]
    return Source(
        kind="energon",
        origin=ascii(", ".join(str(path.absolute()) for path in sources)),
        recipe=[stamp(every), list(tars), sorted(map(ascii, excluded))],
        items=items,
        render=render_energon,
        splits=() if "" in tars else tuple(tars),
        left_out=whole,
    )


def _tars(source: Path) -> list[Path]:
    found = sorted(source.rglob("*.tar")) if source.is_dir() else [source]
    if not found or not found[0].is_file():
        raise DataError(f"{source}: holds no .tar")
    return found


def _read_split(folder: Path) -> tuple[dict[str, list[Path]], frozenset[str]]:
    """(split -> tars, excluded tars and ``TAR/KEY`` of samples)."""
    path = folder / _SPLIT
    try:
        content = yaml.safe_load(path.read_text())
        excluded = frozenset(str(folder / name) for name in content.get("exclude") or ())
        tars = {
            str(split): [folder / name for name in names if str(folder / name) not in excluded]
            for split, names in content["split_parts"].items()
            if names
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: expected split_parts, lists of tars by split; found something else ({error!r})"
        ) from None
    if missing := [str(tar) for paths in tars.values() for tar in paths if not tar.is_file()]:
        raise DataError(f"{path}: names {len(missing)} tars that are not there, first {missing[0]}")
    if not any(tars.values()):
        raise DataError(f"{path}: split_parts names no tar")
    return tars, excluded


def render_energon(item: Item) -> Rendered:
    """A sample as ours; one without parallel lists is a plain one, which needs no change."""
    path, start, end = item.payload
    with open(path, "rb") as file:
        file.seek(start)
        members = parse_members(file.read(end - start), item.key, path)
    try:
        document = json.loads(members["json"]) if "json" in members else None
    except ValueError as error:
        raise SampleError("bad_json", f"{path}: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("texts"), list):
        return Rendered({"__key__": item.key, **members})
    kinds = [name for name in ("images", "audios", "videos") if isinstance(document.get(name), list)]
    texts, *media = parallel_lists(document, "texts", *kinds)
    parts: list[Part] = []
    for place, text in enumerate(texts):
        for kind, names in zip(kinds, media, strict=True):
            if names[place] is not None:
                parts.append(_member(item.key, kind, str(names[place]), members))
        if isinstance(text, str):
            parts.append(text)
        elif text is not None:
            parts.append(LeftOut(item.key, "bad_text", f"expected a text, found {type(text).__name__}"))
    named = {str(name).lower() for names in media for name in names if name is not None}
    spare = sorted(members.keys() - named - {"json"})
    parts += [LeftOut(item.key, "unused", f"{name}: the document does not name it") for name in spare]
    facts = {name: value for name, value in document.items() if name not in ("texts", *kinds)}
    return interleaved_sample(item.key, parts, facts)


def _member(key: str, kind: str, name: str, members: Mapping[str, bytes]) -> Medium | LeftOut:
    if kind == "videos":
        return LeftOut(key, "unsupported_format", f"{name}: films are not read")
    if name.lower() not in members:  # as the members' own names, which are lower-cased when they are read
        return LeftOut(key, "missing_member", f"{name}: members: {', '.join(sorted(members))}")
    return Medium("image" if kind == "images" else "audio", name, data=members[name.lower()])


def parallel_lists(row: Mapping[str, Any], *names: str) -> list[list[Any]]:
    """Columns that must be lists of one length."""
    lists = [row.get(name) for name in names]
    for name, value in zip(names, lists, strict=True):
        if not isinstance(value, list):
            raise SampleError("bad_row", f"{name} should be a list, found {type(value).__name__}")
    if len({len(value) for value in lists}) > 1:  # type: ignore[arg-type]
        lengths = ", ".join(f"{len(value)} {name}" for name, value in zip(names, lists, strict=True))  # type: ignore[arg-type]
        raise SampleError("bad_row", f"expected lists of one length, found {lengths}")
    return lists  # type: ignore[return-value]
