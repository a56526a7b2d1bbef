"""What an HTML page says and shows, in reading order."""

from __future__ import annotations

import re
from collections.abc import Collection
from html.parser import HTMLParser
from typing import NamedTuple

_PARAGRAPHS = frozenset(("p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "dl", "blockquote", "hr"))
_LINES = frozenset(
    ("div", "li", "tr", "dt", "dd", "br", "section", "article", "figure", "figcaption", "header", "body")
)
_SILENT = frozenset(("script", "style", "head", "template", "noscript"))
_SPACE = re.compile(r"[ \t\r\n\f\xa0]+")  # a space that must not break a line is a space to a reader


class Picture(NamedTuple):
    """An ``img`` element.

    Attributes:
        source: its ``src``, as written.
        alt: its alternative text.
    """

    source: str
    alt: str


class Page(NamedTuple):
    """One HTML page.

    Attributes:
        title: of the head.
        links: ``link`` elements of the head: ``rel`` -> ``href``.
        unit: class of the first ``div`` that is not skipped.
        parts: texts and pictures in reading order; texts bring their own spaces and line ends.
    """

    title: str
    links: dict[str, str]
    unit: str
    parts: list[str | Picture]


def read_page(html: str, skip_classes: Collection[str] = ()) -> Page:
    """Reads a page; elements of `skip_classes` say nothing.

    Paragraphs are parted by an empty line, list items and rows by a line end, cells by a space; spaces elsewhere mean
    nothing, as in a browser, except in ``pre``.
    """
    reader = _Reader(frozenset(skip_classes))
    reader.feed(html)
    reader.close()
    reader.end_text()
    return Page(_SPACE.sub(" ", reader.title).strip(), reader.links, reader.unit, reader.parts)


class _Reader(HTMLParser):
    def __init__(self, skip_classes: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.title, self.unit = "", ""
        self.links: dict[str, str] = {}
        self.parts: list[str | Picture] = []
        self._skip_classes = skip_classes
        self._skipped: tuple[str, int] | None = None  # element that says nothing, and how deep in its like we are
        self._in_title = False
        self._preformatted = 0
        self._text: list[str] = []
        self._breaks = 0  # line ends due before the next text
        self._space = False  # a space due before it
        self._bullet = False  # a bullet stands alone on its line: what follows joins it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "title":
            self._in_title = True
        elif tag == "link":
            self.links[values.get("rel", "")] = values.get("href", "")
        if self._skipped is not None:
            name, depth = self._skipped
            self._skipped = (name, depth + (tag == name))
            return
        classes = values.get("class", "").split()
        if tag in _SILENT or self._skip_classes.intersection(classes):
            self._skipped = (tag, 1)
            return
        if tag == "div" and not self.unit:
            self.unit = classes[0] if classes else "div"
        if tag == "img" and values.get("src"):
            self._show(Picture(values["src"], values.get("alt", "")))
        self._preformatted += tag == "pre"
        self._part(tag)
        if tag == "li":
            self._say("- ")
            self._bullet = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("img", "br", "hr", "link"):
            self.handle_starttag(tag, attrs)
        else:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if self._skipped is not None:
            name, depth = self._skipped
            depth -= tag == name
            self._skipped = (name, depth) if depth else None
            return
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._part(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif self._skipped is None:
            self._say(data)

    def end_text(self) -> None:
        """What has been said so far becomes a part."""
        if self._text:
            self.parts.append("".join(self._text))
            self._text = []

    def _part(self, tag: str) -> None:
        if self._bullet:
            return
        if tag in _PARAGRAPHS:
            self._breaks = max(self._breaks, 2)
        elif tag in _LINES:
            self._breaks = max(self._breaks, 1)
        elif tag in ("td", "th"):
            self._space = True

    def _say(self, data: str) -> None:
        if self._preformatted:
            self._open()
            self._text.append(data)
            return
        words = _SPACE.sub(" ", data)
        if words.strip(" "):
            self._space |= words[0] == " "
            self._open()
            self._text.append(words.strip(" "))
        self._space |= words[-1:] == " "

    def _show(self, picture: Picture) -> None:
        self._open()
        self.end_text()
        self.parts.append(picture)

    def _open(self) -> None:
        """Writes the line ends or the space that are due, none of them at the start of the page."""
        if self.parts or self._text:
            if self._breaks:
                self._text.append("\n" * self._breaks)
            elif self._space and not (self._text and self._text[-1].endswith(" ")):
                self._text.append(" ")
        self._breaks, self._space, self._bullet = 0, False, False
