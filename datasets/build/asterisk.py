"""Asterisk's spoken prompts with their transcripts."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

from mmctx.datasets.build.members import LeftOut, Medium, Rendered, plain_sample, safe_key
from mmctx.datasets.build.package import installed
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, listed, mix

FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
PACKAGES = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")

_NOISE = re.compile(r"[\[(<].*[\])>]")  # "[ascending tones]": what is heard, not what is said


def build_asterisk(
    out: Path, folder: Path = FOLDER, transcripts: Path = TRANSCRIPTS, *, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Shards of (speech, transcript); see `build_shards` for what is written. Prompts with the same words are held out together.

    Args:
        folder: of the ``.wav`` files.
        transcripts: lines such as ``digits/1: one``, gzipped or not.

    Raises:
        DataError: the prompts or their transcripts are not there.
    """
    clips = sorted(installed(folder, PACKAGES[0]).rglob("*.wav"))
    texts = read_transcripts(installed(transcripts, PACKAGES[1]))
    left_out: list[LeftOut] = []
    items = []
    for path in clips:
        name = path.relative_to(folder).with_suffix("").as_posix()
        text = texts.pop(name, None)
        if text is None:
            left_out.append(LeftOut(name, "no_text", f"not in {transcripts.name}"))
        elif _NOISE.fullmatch(text):
            left_out.append(LeftOut(name, "not_speech", text))
        else:
            group = re.sub(r"[\W_]+", " ", text.lower()).strip()
            items.append(Item(safe_key(name), (str(path), text), group))
    left_out += [LeftOut(name, "no_media", f"no {name}.wav") for name in texts]
    source = Source(
        kind="asterisk",
        origin=str(folder),
        recipe=stamp([transcripts, *clips]),
        items=listed(mix(items)),
        render=_render,
        total=len(items),
        left_out=left_out,
    )
    return build_shards(source, out, options or BuildOptions())


def read_transcripts(path: Path) -> dict[str, str]:
    """Prompt -> its words. Lines that begin with ``;`` are remarks."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        pairs = (line.partition(":") for line in file if not line.startswith(";"))
        return {name.strip(): " ".join(text.split()) for name, colon, text in pairs if colon and text.strip()}


def _render(item: Item) -> Rendered:
    path, text = item.payload
    return plain_sample(item.key, [Medium("audio", item.key, path=path)], text)
