"""Interleaved documents of other projects -> ours: OBELICS, MMC4, Megatron-Energon."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmctx.datasets.build.energon import Part, energon_source, parallel_lists
from mmctx.datasets.build.members import LeftOut, Medium, Rendered, interleaved_sample, safe_key
from mmctx.datasets.build.rows import find_tables, read_rows, stamp
from mmctx.datasets.build.store import PictureStore
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.table import jsonable, key_prefixes
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import ConfigError, SampleError

LAYOUTS = ("obelics", "mmc4", "energon")

_BETWEEN_TEXTS = {
    "obelics": "\n\n",
    "mmc4": " ",
}  # OBELICS lists paragraphs, MMC4 sentences; their lists hold no spaces


def convert(
    layout: str,
    sources: Sequence[Path],
    out: Path,
    *,
    images: Sequence[Path] = (),
    addresses: Path | None = None,
    image_after_text: bool = False,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards of the documents in `sources`, in their order; see `build_shards` for what is written.

    A picture that cannot be found or read is left out of its document, with a line in ``left_out.jsonl``; a document goes
    only if nothing is left of it.

    Args:
        layout: ``obelics``: records of parallel lists ``texts`` and ``images``, None where the other has the entry;
            ``mmc4``: records of ``text_list`` and ``image_info``, whose ``matched_text_index`` says beside which text;
            ``energon``: tars whose ``KEY.json`` holds such parallel lists (``audios``, too) of the sample's own members.
        sources: JSON-lines or Parquet files, or folders of them; for ``energon``, tars, or folders of them.
        images: folders and tars in which the records' pictures lie.
        addresses: a CSV with ``url`` and ``file``: where the picture of each address was put.
        image_after_text: for ``mmc4``: a picture follows its text instead of preceding it.

    Raises:
        DataError: a source cannot be read, or no document is left.
        ConfigError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout should be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if layout == "energon":
        source = energon_source(sources)
    else:
        source = _records(layout, sources, images, addresses, image_after_text)
    return build_shards(source, out, options or BuildOptions())


def _records(
    layout: str, sources: Sequence[Path], images: Sequence[Path], addresses: Path | None, image_after_text: bool
) -> Source:
    paths = find_tables(sources)
    prefixes = key_prefixes(paths)
    stores = {
        path.parent: PictureStore(images, path.parent, addresses) for path in {p.parent: p for p in paths}.values()
    }
    parse = functools.partial(_mmc4_parts, after=image_after_text) if layout == "mmc4" else _obelics_parts

    def items(split: str, start: int) -> Iterator[Item]:
        for path, number, row in read_rows(paths, start):
            key = f"{prefixes[path]}-{number:08d}"
            if isinstance(row, SampleError):
                line = LeftOut(f"{path}#{number}", row.reason, row.detail)
                yield Item(key, line)
                continue
            try:
                # Here, not in a worker: which file has a picture is known here, and a row may carry all its pages' bytes.
                parts, facts = parse(row, stores[path.parent])
            except SampleError as error:
                yield Item(key, LeftOut(f"{path}#{number}", error.reason, error.detail))
                continue
            parts = [LeftOut(safe_key(key), *part[1:]) if isinstance(part, LeftOut) else part for part in parts]
            yield Item(safe_key(key), (_spaced(parts, _BETWEEN_TEXTS[layout]), facts))

    return Source(
        kind=layout,
        origin=ascii(", ".join(str(path.absolute()) for path in sources)),
        recipe=[stamp(paths), image_after_text, [store.recipe for store in stores.values()]],
        items=items,
        render=_render,
    )


def _render(item: Item) -> Rendered:
    parts, facts = item.payload
    return interleaved_sample(item.key, parts, facts)


def _spaced(parts: Sequence[Part], between: str) -> list[Part]:
    """Parts with `between` after every text that is not the last; an empty text says nothing."""
    kept: list[Part] = [part for part in parts if part != ""]
    last = max((n for n, part in enumerate(kept) if isinstance(part, str)), default=-1)
    return [part + between if isinstance(part, str) and n != last else part for n, part in enumerate(kept)]


def _obelics_parts(row: Mapping[str, Any], store: PictureStore) -> tuple[list[Part], dict[str, Any]]:
    images, texts = parallel_lists(row, "images", "texts")
    parts = [part for image, text in zip(images, texts, strict=True) for part in _pair(image, text, store.resolve)]
    facts = {name: jsonable(v) for name, v in row.items() if name not in ("images", "texts") and v is not None}
    return parts, facts


def _pair(image: Any, text: Any, resolve: Any) -> Iterator[Part]:
    """What one place of the parallel lists holds: a picture, a text, both, or nothing."""
    if image is not None and image != "":
        try:
            yield resolve(image)
        except SampleError as error:
            yield LeftOut("", error.reason, error.detail)
    if isinstance(text, str):
        yield text
    elif text is not None:
        yield LeftOut("", "bad_text", f"expected a text, found {type(text).__name__}")


def _mmc4_parts(row: Mapping[str, Any], store: PictureStore, after: bool) -> tuple[list[Part], dict[str, Any]]:
    (texts,) = parallel_lists(row, "text_list")
    (infos,) = parallel_lists(row, "image_info")
    beside: dict[int, list[Part]] = {}
    for info in infos:
        place = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(texts):
            detail = f"matched_text_index should be 0..{len(texts) - 1}, found {place!r}"
            beside.setdefault(0, []).append(LeftOut("", "bad_place", detail))
        else:
            beside.setdefault(place, []).append(_mmc4_picture(info, store))
    parts: list[Part] = []
    for place, text in enumerate(texts or [""]):
        pictures = beside.get(place, [])
        words = list(_pair(None, text, None))
        parts += [*words, *pictures] if after else [*pictures, *words]
    used = ("text_list", "image_info", "similarity_matrix")  # the matrix has done its work: it gave the places
    return parts, {name: jsonable(value) for name, value in row.items() if name not in used and value is not None}


def _mmc4_picture(info: Mapping[str, Any], store: PictureStore) -> Medium | LeftOut:
    """By its bytes, its file, its address, whichever is there."""
    if info.get("image_base64"):
        try:
            data = base64.b64decode(info["image_base64"], validate=True)
            return Medium("image", str(info.get("image_name", "image_base64")), data=data)
        except (binascii.Error, ValueError, TypeError) as error:
            return LeftOut("", "bad_cell", f"image_base64: {error}")
    names = [info[name] for name in ("image_name", "raw_url") if isinstance(info.get(name), str)]
    for name in names:
        found = store.find(name)
        if found is not None:
            return found
    return LeftOut("", "missing_file", f"{' or '.join(names) or 'no image_name'}: not among the pictures")
