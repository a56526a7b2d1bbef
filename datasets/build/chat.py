"""Shards of conversations: JSON lines of chat messages with pictures and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmctx.chat import ChatTemplate
from mmctx.datasets.build.members import LeftOut, Members, Rendered, encode_json
from mmctx.datasets.build.rows import count_rows, find_tables, read_rows, stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.table import Columns, jsonable, key_prefixes, medium_of, row_item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import SampleError


def build_chat(
    sources: Sequence[Path],
    out: Path,
    *,
    media_root: Path | None = None,
    key: str | None = None,
    group: str | None = None,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards of conversations, in the order of the rows; see `build_shards` for what is written.

    A row holds `messages` as `mmctx.chat` describes; media are named by their paths. Other columns go into the json member as they are.

    Args:
        sources: tables, or folders of tables.
        media_root: folder that paths are relative to; that of the table by default.
        key: column that names the samples.
        group: column of what is held out together, such as the customer.

    Raises:
        DataError: a table cannot be read, or nothing in it can be used.
    """
    paths = find_tables(sources)
    prefixes, chosen = key_prefixes(paths), Columns(key=key, group=group)

    def items(split: str, start: int) -> Iterator[Item]:
        for path, number, row in read_rows(paths, start):
            where = f"{path}#{number}"
            if isinstance(row, SampleError):
                yield Item(where, LeftOut(where, row.reason, row.detail))
            else:
                yield row_item(row, chosen, f"{prefixes[path]}-{number:08d}", str(media_root or path.parent))

    source = Source(
        kind="chat",
        origin=", ".join(str(path.absolute()) for path in sources),
        recipe=[stamp(paths), ascii(media_root), key, group],
        items=items,
        render=_render,
        total=count_rows(paths),
    )
    return build_shards(source, out, options or BuildOptions())


def _render(item: Item) -> Rendered:
    """The members of a row. A medium that cannot be used takes the conversation with it: an answer about it would teach nothing."""
    row, media_root = item.payload
    ChatTemplate().lay_out(row.get("messages"))  # raises what the index would raise
    members: Members = {"__key__": item.key}
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [_part(part, members, media_root) for part in content]
        messages.append({**message, "content": content})
    facts = {name: jsonable(value) for name, value in row.items() if name not in ("messages", "segments")}
    members["json"] = encode_json({**facts, "messages": messages})
    return Rendered(members)


def _part(part: dict[str, Any], members: Members, media_root: str) -> dict[str, Any]:
    """The same part, its medium put into `members`."""
    kind = part["type"]
    if kind == "text":
        return part
    extension, data = medium_of(part[kind], kind, kind, media_root).member()
    name = f"{len(members) - 1}.{extension}"
    members[name] = data
    return {**part, kind: name}
