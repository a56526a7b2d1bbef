"""Picture books: long documents in which pictures, spoken names and prose follow one another.

Each book has a theme. A page shows a picture or plays a name and then says what it was; later pages come back to
earlier ones by number, by showing the picture again or by playing the clip again, and talkative books recount after
every page what was seen and heard before, so that a reader with a long context does better. Books are drafted first
(text and keys), then cut to the context at the end of a page, then filled with bytes.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmctx.datasets.build.catalogue import Emoji, keyed_hash

MIN_SEGMENTS, MAX_SEGMENTS = 4, 60
MAX_RECOUNTED = 16
TOKENS_PER_PICTURE = 4  # the demo's model: 64 pixels, patches of 16, 2 x 2 of them merged
TOKENS_PER_SECOND = 100 / 16  # 100 frames a second, 16 of them a token

_TITLES = (
    "The book of {theme}.\n",
    "A picture book about {theme}.\n",
    "Look and listen: {theme}.\n",
    "What I saw and heard: {theme}.\n",
    "My first {theme}.\n",
)
_LOOK = (
    "Look here. ",
    "What is this? ",
    "Here is a picture. ",
    "On this page we see something new. ",
    "Turn and look. ",
)
_LISTEN = ("Listen. ", "Someone says a word. ", "Now a voice speaks. ", "What do you hear? ", "Hear this name. ")
_SHOWN = (
    "This is the {name}.\n",
    "We call it the {name}.\n",
    "It shows the {name}.\n",
    "Its name is {name}.\n",
    "You can see the {name} here.\n",
    "It is the {name}, {zh} in Chinese.\n",
)
_SAID = (
    "The voice said {name}.\n",
    "That was the {name}.\n",
    "We heard the words {name}.\n",
    "It named the {name}.\n",
    "Someone said {name}, which is {zh} in Chinese.\n",
)
_SHOWN_THEN_SAID = ("This is the {name}. It is spoken like this: ", "We see the {name}, and we hear its name: ")
_AFTER_SAID = ("Yes, {name}.\n", "So the {name} was named.\n", "Again: {name}.\n")
_BACK_BY_NUMBER = {
    "picture": ("The picture on page {page} was the {name}.\n", "Do you remember page {page}? It showed the {name}.\n"),
    "sound": ("The voice on page {page} said {name}.\n", "Do you remember page {page}? We heard the words {name}.\n"),
}
_RECOUNTED = {
    "picture": (
        "Page {page} showed the {name}.",
        "On page {page} we saw the {name}.",
        "The {name} was the picture on page {page}.",
        "Do not forget the {name} on page {page}.",
        "There was a picture of the {name} on page {page}.",
    ),
    "sound": (
        "On page {page} a voice said {name}.",
        "We heard {name} on page {page}.",
        "The words {name} were spoken on page {page}.",
        "Page {page} was the one that sounded like {name}.",
        "Someone named the {name} on page {page}.",
    ),
}
_BACK_BY_PICTURE = ("We have seen this before. ", "Where was this picture? ", "Here it is again. ")
_BACK_BY_SOUND = ("We have heard this before. ", "Where was this voice? ", "Listen to it again. ")
_ANSWERS = (
    "It was on page {page}: the {name}.\n",
    "Page {page} had it, the {name}.\n",
    "That was page {page}, {name}.\n",
)


class Segment(NamedTuple):
    """One piece of a book; ``value`` is the text itself, or the key of the emoji that is shown or spoken."""

    kind: Literal["text", "image", "audio"]
    value: str


Page = list[Segment]


@dataclass(frozen=True)
class _Seen:
    """An emoji that an earlier page showed or spoke."""

    page: int
    emoji: Emoji
    kind: Literal["picture", "sound"]


def draft_books(emoji: Sequence[Emoji], seed: int, num_books: int) -> list[list[Page]]:
    """``num_books`` books over ``emoji``, each a title page and then numbered pages, 4 to 60 segments in all.

    Themes are drawn evenly, so the many people with skin tones do not crowd out the rest; lengths are log-uniform.
    """
    themes: dict[str, list[Emoji]] = {}
    for item in emoji:
        themes.setdefault(item.group, []).append(item)
    names = sorted(themes)
    books = []
    for number in range(num_books):
        rng = random.Random(keyed_hash("book", seed, number))
        theme = rng.choice(names)
        target = int(math.exp(rng.uniform(math.log(MIN_SEGMENTS), math.log(MAX_SEGMENTS + 1))))
        cast = themes[theme] if len(themes[theme]) >= MAX_SEGMENTS // 3 else emoji  # a small build has small themes
        books.append(_draft(rng, theme, cast, target))
    return books


def _draft(rng: random.Random, theme: str, emoji: Sequence[Emoji], num_segments: int) -> list[Page]:
    """A title and pages until ``num_segments`` are reached. No two emoji of a book share a picture."""
    cast = list({item.picture: item for item in rng.sample(emoji, len(emoji))}.values())
    recounted = int(math.exp(rng.uniform(0, math.log(MAX_RECOUNTED + 1)))) - 1  # sentences after a page, at most
    pages: list[Page] = []
    seen: list[_Seen] = []
    room = num_segments - 1
    while room > 0:
        number = len(pages) + 1
        page = _write_page(rng, number, room, cast, seen)
        if page is None:
            break
        earlier = [item for item in seen if item.page < number]
        page[-1] = Segment("text", page[-1].value + _recount(rng, earlier, recounted))
        pages.append(page)
        room -= len(page)
    return [[Segment("text", rng.choice(_TITLES).format(theme=theme))], *pages]


def _write_page(rng: random.Random, number: int, room: int, cast: list[Emoji], seen: list[_Seen]) -> Page | None:
    """One page of at most ``room`` segments, new or looking back; takes from ``cast`` and adds to ``seen``."""
    heading = f"Page {number}. "
    if seen and (room < 3 or not cast or rng.random() < 0.3):
        return _look_back(rng, heading, rng.choice(seen), room)
    if room < 3 or not cast:
        return None
    item = cast.pop()
    fill = {"name": item.name, "zh": item.name_zh}
    image, audio = Segment("image", item.key), Segment("audio", item.key)
    draw = rng.random()
    if draw < 0.45:
        seen.append(_Seen(number, item, "picture"))
        texts = [heading + rng.choice(_LOOK), rng.choice(_SHOWN).format(**fill)]
        return [Segment("text", texts[0]), image, Segment("text", texts[1])]
    if draw < 0.8 or room < 5:
        seen.append(_Seen(number, item, "sound"))
        texts = [heading + rng.choice(_LISTEN), rng.choice(_SAID).format(**fill)]
        return [Segment("text", texts[0]), audio, Segment("text", texts[1])]
    seen += [_Seen(number, item, "picture"), _Seen(number, item, "sound")]
    texts = [heading + rng.choice(_LOOK), rng.choice(_SHOWN_THEN_SAID), rng.choice(_AFTER_SAID)]
    first, middle, last = (Segment("text", text.format(**fill)) for text in texts)
    return [first, image, middle, audio, last]


def _look_back(rng: random.Random, heading: str, seen: _Seen, room: int) -> Page:
    """Asks for something of an earlier page: by its number alone, or by showing or playing it again."""
    fill = {"name": seen.emoji.name, "page": seen.page}
    if room < 3 or rng.random() < 0.4:
        return [Segment("text", heading + rng.choice(_BACK_BY_NUMBER[seen.kind]).format(**fill))]
    question = rng.choice(_BACK_BY_PICTURE if seen.kind == "picture" else _BACK_BY_SOUND)
    medium = Segment("image" if seen.kind == "picture" else "audio", seen.emoji.key)
    return [Segment("text", heading + question), medium, Segment("text", rng.choice(_ANSWERS).format(**fill))]


def _recount(rng: random.Random, earlier: list[_Seen], most: int) -> str:
    """What earlier pages held, in up to ``most`` sentences, one line in all; nothing at the start of a book."""
    recalled = rng.sample(earlier, min(most, len(earlier)))
    sentences = [rng.choice(_RECOUNTED[s.kind]).format(page=s.page, name=s.emoji.name) for s in recalled]
    return " ".join(sentences) + "\n" if sentences else ""


def book_text(book: Sequence[Page]) -> str:
    """All prose of a book in order."""
    return "".join(segment.value for page in book for segment in page if segment.kind == "text")


def page_tokens(page: Page, count_tokens: Callable[[str], int], seconds: Mapping[str, float]) -> int:
    """Tokens of a page for the demo's model: 4 a picture, ``ceil(seconds * 100 / 16)`` a clip, text by the tokenizer."""
    total = 0
    for kind, value in page:
        if kind == "text":
            total += count_tokens(value)
        elif kind == "image":
            total += TOKENS_PER_PICTURE
        else:
            total += math.ceil(seconds[value] * TOKENS_PER_SECOND)
    return total


def fit_book(book: Sequence[Page], context_length: int, tokens: Callable[[Page], int]) -> list[Page]:
    """The first pages of ``book`` that fit in ``context_length`` tokens; pages only look back, so any cut is sound."""
    kept: list[Page] = []
    room = context_length
    for page in book:
        room -= tokens(page)
        if room < 0:
            break
        kept.append(page)
    return kept


def book_sample(key: str, book: Sequence[Page], media: Mapping[str, Mapping[str, bytes]]) -> dict[str, str | bytes]:
    """The members of one interleaved sample. ``media[emoji key]`` holds its ``png`` and ``flac``.

    Media are numbered in running order and each has its own member, also when a picture is shown again.
    """
    sample: dict[str, str | bytes] = {"__key__": key}
    segments = []
    for kind, value in (segment for page in book for segment in page):
        if kind == "text":
            segments.append({"text": value})
            continue
        extension = "png" if kind == "image" else "flac"
        name = f"{len(sample) - 1}.{extension}"
        sample[name] = media[value][extension]
        segments.append({kind: name})
    sample["json"] = json.dumps({"segments": segments}, ensure_ascii=False).encode()
    return sample
