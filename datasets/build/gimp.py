"""The GIMP manual: long documents in which text and pictures alternate as in the book."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmctx.datasets.build.html import Page, read_page
from mmctx.datasets.build.members import LeftOut, Medium, Rendered, interleaved_sample
from mmctx.datasets.build.package import installed
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, listed, mix
from mmctx.errors import ConfigError, DataError

FOLDER = Path("/usr/share/gimp/2.0/help/en")
PACKAGE = "gimp-help-en"

Unit = Literal["page", "chapter"]

_FURNITURE = ("navheader", "navfooter", "toc")  # links to other pages
_BEGINS_CHAPTER = ("chapter", "appendix", "preface", "glossary", "bibliography", "part", "reference")
_NO_PROSE = ("book", "index")  # a table of contents and a list of page names
_BADGES = frozenset(f"images/{name}.png" for name in ("note", "tip", "warning", "caution", "important"))


class _Chapter(NamedTuple):
    name: str
    title: str
    pages: list[str]


def build_gimp(
    out: Path, folder: Path = FOLDER, *, unit: Unit = "page", options: BuildOptions | None = None
) -> dict[str, Any]:
    """Shards of interleaved documents; see `build_shards` for what is written. Chapters are held out whole.

    Args:
        folder: of one language's HTML pages.
        unit: what becomes a document.

    Raises:
        DataError: the manual is not there.
        ConfigError: there is no such unit.
    """
    if unit not in ("page", "chapter"):
        raise ConfigError(f"unit should be page or chapter, found {unit!r}")
    left_out: list[LeftOut] = []
    chapters = read_chapters(installed(folder / "index.html", PACKAGE), left_out)
    items = []
    for chapter in chapters:
        if unit == "chapter":
            items.append(Item(chapter.name, (str(folder), chapter.title, chapter.pages)))
        else:
            items += [Item(Path(p).stem, (str(folder), chapter.title, [p]), chapter.name) for p in chapter.pages]
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".html", ".png", ".jpg"))
    source = Source(
        kind="gimp",
        origin=f"{folder} by {unit}",
        recipe=stamp(files),
        items=listed(mix(items)),
        render=_render,
        total=len(items),
        left_out=left_out,
        facts={"chapters": len(chapters), "pages": sum(len(chapter.pages) for chapter in chapters)},
    )
    return build_shards(source, out, options or BuildOptions())


def read_chapters(index: Path, left_out: list[LeftOut]) -> list[_Chapter]:
    """Chapters and their pages in reading order, as the pages' links to the next one tell."""
    chapters: list[_Chapter] = []
    seen: dict[str, None] = {}
    name = index.name
    while name and name not in seen:
        seen[name] = None
        page = _read(index.with_name(name))
        if page.unit in _NO_PROSE:
            left_out.append(LeftOut(name, "no_prose", f"the {page.unit} of the manual"))
        elif page.unit in _BEGINS_CHAPTER or not chapters:
            chapters.append(_Chapter(Path(name).stem, page.title, [name]))
        else:
            chapters[-1].pages.append(name)
        name = page.links.get("next", "")
    unlinked = sorted(path.name for path in index.parent.glob("*.html") if path.name not in seen)
    left_out += [LeftOut(name, "unlinked", "no page leads to it") for name in unlinked]
    return chapters


def _read(path: Path) -> Page:
    try:
        return read_page(path.read_text(encoding="utf-8"), _FURNITURE)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); install {PACKAGE} again") from None


def _render(item: Item) -> Rendered:
    """The pages of a document one after another; badges beside notes and tips are left out, like other ornaments."""
    folder, chapter, names = item.payload
    parts: list[str | Medium | LeftOut] = []
    badges: Counter[str] = Counter()
    for name in names:
        after_badge = False
        for part in _read(Path(folder, name)).parts:
            if isinstance(part, str):
                parts.append(part.lstrip(" ") if after_badge else part)
                after_badge = False
                continue
            after_badge = part.source in _BADGES
            if after_badge:
                badges[part.source] += 1
            else:
                parts.append(Medium("image", part.source, path=str(Path(folder, part.source))))
        parts.append("\n\n")
    parts += [LeftOut(item.key, "ornament", f"{badge}, {count} times") for badge, count in sorted(badges.items())]
    return interleaved_sample(item.key, parts, {"chapter": chapter, "pages": names})
