"""Tux Paint's stamps: pictures, their captions in many languages, spoken captions and sounds."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmctx.datasets.build.catalogue import demo_package
from mmctx.datasets.build.members import LeftOut, Medium, Rendered, plain_sample, safe_key
from mmctx.datasets.build.package import installed
from mmctx.datasets.build.rows import stamp as stamp_files
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, is_heldout, listed, mix
from mmctx.errors import ConfigError, DataError, SampleError

FOLDER = Path("/usr/share/tuxpaint/stamps")
PACKAGE = "tuxpaint-stamps-default"

View = Literal["spoken", "captioned", "sounding"]

_PICTURES = (".png", ".svg")
_SOUNDS = (".ogg", ".wav")


@dataclass(frozen=True, slots=True)
class Stamp:
    """One stamp.

    Attributes:
        name: its path below the folder, without suffix.
        picture: PNG or SVG file.
        captions: language -> caption; ``en`` always.
        spoken: language -> file in which a person says the caption.
        sound: file of the noise it makes.
    """

    name: str
    picture: str
    captions: dict[str, str]
    spoken: dict[str, str]
    sound: str | None


def build_stamps(
    out: Path,
    folder: Path = FOLDER,
    *,
    view: View = "spoken",
    languages: Sequence[str] = (),
    image_size: int = 256,
    shuffled: bool = False,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Shards of stamps; see `build_shards` for what is written. Stamps that share a caption in any language are held out together.

    Args:
        folder: of the stamps.
        view: ``spoken``: a sample for each stamp and language with a spoken caption: picture, caption, speech;
            ``captioned``: one for each stamp: picture and English caption, all captions as ``names`` in the json;
            ``sounding``: one for each stamp with a noise: picture, English caption, noise.
        languages: of captions, such as ``fr``, ``zh_CN``; all by default.
        image_size: width of stamps that are drawn from SVG, in pixels.
        shuffled: a control: in training, give pictures and clips the captions of other stamps. What is held out stays right, and a
            model that was trained on such pairs must be at chance there.

    Raises:
        DataError: the stamps are not there, or none is left.
        ConfigError: there is no such view or language.
    """
    left_out: list[LeftOut] = []
    installed(folder, PACKAGE)
    stamps = read_stamps(folder, left_out)
    known = {language for stamp in stamps for language in stamp.captions}
    if unknown := sorted(set(languages) - known):
        raise ConfigError(f"languages: no caption in {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if view not in ("spoken", "captioned", "sounding"):
        raise ConfigError(f"view should be spoken, captioned or sounding, found {view!r}")
    wanted = set(languages) or known
    groups = caption_groups(stamps)
    options = options or BuildOptions()
    items = mix(item for stamp in stamps for item in _items(stamp, view, wanted, groups[stamp.name], left_out))
    if shuffled:
        items = _shuffle_captions(items, options.heldout)
    files = [Path(p) for s in stamps for p in (s.picture, *s.spoken.values(), s.sound) if p]
    source = Source(
        kind="stamps",
        origin=f"{folder} as {view}",
        recipe=[
            stamp_files(sorted(files)),
            sorted(wanted),
            image_size,
            _drawn_by(),
            [s.captions for s in stamps],
            groups,
            *(["shuffled"] if shuffled else []),
        ],
        items=listed(items),
        render=functools.partial(_render, image_size=image_size),
        total=len(items),
        costly=True,
        left_out=left_out,
        facts={
            "stamps": len({item.payload[0].name for item in items}),
            "languages": dict(Counter(item.payload[1] for item in items).most_common()),
        },
    )
    return build_shards(source, out, options)


def _shuffle_captions(items: Sequence[Item], heldout: float) -> list[Item]:
    """Each training item says what the one before it in its language says; the first, what the last does."""
    before: dict[str, dict[str, str]] = {}
    found = []
    for item in (*items, *items):  # of the second round, in which all have one before them
        stamp, language, clip = item.payload
        if is_heldout(item.group, heldout):
            found.append(item)
        else:
            captions = before.get(language, stamp.captions)
            found.append(replace(item, payload=(replace(stamp, captions=captions), language, clip)))
            before[language] = stamp.captions
    return found[len(items) :]


def read_stamps(folder: Path, left_out: list[LeftOut]) -> list[Stamp]:
    """Every stamp that has a caption and a picture; what lacks one goes to `left_out`."""
    stamps = []
    for path in sorted(folder.rglob("*.txt")):
        stem = path.with_suffix("")
        name = stem.relative_to(folder).as_posix()
        picture = next((str(p) for suffix in _PICTURES if (p := stem.with_suffix(suffix)).exists()), None)
        if picture is None:
            left_out.append(LeftOut(name, "no_media", f"neither {stem.name}.png nor {stem.name}.svg"))
            continue
        captions = _read_captions(path)
        if not captions.get("en"):
            left_out.append(LeftOut(name, "no_text", "the first line, its English caption, is empty"))
            continue
        sound = next((str(p) for suffix in _SOUNDS if (p := stem.with_suffix(suffix)).exists()), None)
        stamps.append(Stamp(name, picture, captions, _spoken(stem), sound))
    return stamps


def _read_captions(path: Path) -> dict[str, str]:
    """English in the first line, then ``de.utf8=Ein Frosch.``"""
    try:
        first, *others = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}") from None
    pairs = (line.partition(".utf8=") for line in others)
    captions = {"en": first.strip()} | {language: text.strip() for language, mark, text in pairs if mark}
    return {language: text for language, text in captions.items() if text}


def _spoken(stem: Path) -> dict[str, str]:
    """Files such as ``frog_desc_fr.ogg``, by language; without one, it is English."""
    found: dict[str, str] = {}
    for path in sorted(stem.parent.glob(f"{stem.name}_desc*")):
        language = path.name.removeprefix(f"{stem.name}_desc").partition(".")[0].removeprefix("_") or "en"
        if path.suffix in _SOUNDS:
            found.setdefault(language, str(path))
    return found


def caption_groups(stamps: Sequence[Stamp]) -> dict[str, str]:
    """A group for each stamp, by name: stamps that share a caption in some language, directly or over others, have the same one.

    Two stamps may be told apart in English and not in French: held out one by one, one's caption would be in training. Case and
    punctuation do not count.
    """
    leader = {stamp.name: stamp.name for stamp in stamps}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first: dict[tuple[str, str], str] = {}
    for stamp in stamps:
        for language, caption in stamp.captions.items():
            same = first.setdefault((language, re.sub(r"\W+", " ", caption.lower()).strip()), stamp.name)
            one, other = sorted((find(stamp.name), find(same)))
            leader[other] = one
    return {name: find(name) for name in leader}


def _items(stamp: Stamp, view: View, wanted: set[str], group: str, left_out: list[LeftOut]) -> list[Item]:
    if view == "captioned":
        return [Item(safe_key(stamp.name), (stamp, "en", None), group)] if "en" in wanted else []
    if view == "sounding":
        return [Item(safe_key(stamp.name), (stamp, "en", stamp.sound), group)] if stamp.sound else []
    items = []
    for language, path in stamp.spoken.items():
        key = f"{safe_key(stamp.name)}@{language}"
        if language in stamp.captions and language in wanted:
            items.append(Item(key, (stamp, language, path), group))
        elif language not in stamp.captions:
            left_out.append(LeftOut(key, "no_text", f"spoken in {language}, but not written"))
    return items


def _render(item: Item, image_size: int) -> Rendered:
    stamp, language, clip = item.payload
    media = [_picture(stamp.picture, image_size)]
    if clip is not None:
        media.append(Medium("audio", clip, path=clip))
    facts = {"stamp": stamp.name, "language": language, "names": stamp.captions}
    return plain_sample(item.key, media, stamp.captions[language], facts)


def _drawn_by() -> str | None:
    """Version of what draws SVGs; a stamp may look different under another one."""
    try:
        return importlib.metadata.version("resvg_py")
    except importlib.metadata.PackageNotFoundError:
        return None


def _picture(path: str, image_size: int) -> Medium:
    return Medium("image", path, path=path, data=_draw(path, image_size) if path.endswith(".svg") else None)


@functools.lru_cache(maxsize=512)  # one stamp is spoken in many languages; drawing takes longer than all the rest
def _draw(path: str, image_size: int) -> bytes:
    """An SVG as PNG on white."""
    try:
        resvg = demo_package("resvg_py")
    except DataError as error:
        raise SampleError("unsupported_format", f"{path}: {error}") from None
    try:
        # Without a resolution, sizes in centimetres and points count as none.
        drawn = resvg.svg_to_bytes(
            svg_path=path, width=image_size, background="white", skip_system_fonts=True, dpi=96.0
        )
    except Exception as error:  # resvg raises plain ValueErrors, among others
        raise SampleError("undecodable_image", f"{path}: {error}") from None
    return bytes(drawn)
