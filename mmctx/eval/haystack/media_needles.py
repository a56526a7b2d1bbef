"""Needles that are pictures and sounds, and chains across them.

The pictures and clips are held-out samples of the run with their texts: whoever has such samples can ask. Retrieval, counting and the
soft accuracy of counts follow MM-NIAH (Wang et al. 2024); a key's value that is a picture, and a picture that is a key, follow RULER's
keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmctx.eval.haystack.config import NeedleConfig
from mmctx.eval.haystack.material import Named
from mmctx.eval.haystack.probe import Choice, Lacking, Needle, Probe, ranked
from mmctx.eval.haystack.words import enumerated, keys, listed, numbers, spread

MOST_COUNTED = 5
"""Most pictures in a box."""
_BOXES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Phrases(NamedTuple):
    """How a modality is spoken of."""

    kind: str
    thing: str
    shows: str
    plural: str


PHRASES = {
    "picture": Phrases("image", "picture", "What does the picture{of} show? It shows:", "pictures"),
    "sound": Phrases("audio", "recording", "What is heard in the recording{of}? It is:", "recordings"),
}
Media = Mapping[str, Sequence[Named]]
MediaMaker = Callable[[NeedleConfig, Media, np.random.Generator, float | None], Probe]


def shown(name: str, config: NeedleConfig, media: Media, rng: np.random.Generator, depth: float | None) -> Probe:
    """Which of the candidates' pictures (or clips) the document holds: one."""
    phrases, depth = PHRASES[name], depth or 0.0
    chosen = draw(media[phrases.kind], config.candidates, rng, phrases.plural)
    needle = Needle((f" Here is a {phrases.thing}:", chosen[0].item, "."), depth)
    return _named(name, (needle,), f" {phrases.shows.format(of='')}", chosen, depth, rng)


def value(name: str, config: NeedleConfig, media: Media, rng: np.random.Generator, depth: float | None) -> Probe:
    """What the picture (or clip) of a key shows, among those of other keys in the same document."""
    phrases, depth = PHRASES[name], depth or 0.0
    chosen = draw(media[phrases.kind], max(config.candidates, 1 + config.needles), rng, phrases.plural)
    names, places = keys(rng, 1 + config.needles), [depth, *rng.random(config.needles).tolist()]
    needles = tuple(
        Needle((f" The {phrases.thing} of {key}:", one.item, "."), place, n == 0)
        for n, (key, one, place) in enumerate(zip(names, chosen, places, strict=False))
    )
    question = f" {phrases.shows.format(of=f' of {names[0]}')}"
    return _named(f"{name}_value", needles, question, chosen[: config.candidates], depth, rng)


def key(name: str, config: NeedleConfig, media: Media, rng: np.random.Generator, depth: float | None) -> Probe:
    """The magic number that stood beside a picture (or clip), which is shown again; others have numbers, too."""
    phrases, depth = PHRASES[name], depth or 0.0
    chosen = draw(media[phrases.kind], 1 + config.needles, rng, phrases.plural)
    values = numbers(rng, max(config.candidates, 1 + config.needles), config.digits)
    places = [depth, *rng.random(config.needles).tolist()]
    stem = f" The magic number of this {phrases.thing}"
    needles = tuple(
        Needle((stem, one.item, " is:", f" {number}", "."), place, n == 0)
        for n, (one, number, place) in enumerate(zip(chosen, values, places, strict=False))
    )
    return Probe(
        f"{name}_key",
        needles,
        (stem, chosen[0].item, " is:"),
        (ranked(values[: config.candidates], values[:1], rng),),
        (values[0],),
        (depth,),
        (f" {values[0]}",),
        avoid=tuple(one.name for one in chosen),
    )


def count(name: str, config: NeedleConfig, media: Media, rng: np.random.Generator, depth: float | None) -> Probe:
    """How many pictures (or clips) there are in each of several boxes, the same one in a box, one to five times."""
    phrases = PHRASES[name]
    boxes = [_BOXES[n] for n in rng.permutation(len(_BOXES))[: config.needles]]
    chosen = draw(media[phrases.kind], len(boxes), rng, phrases.plural)
    most = min(config.candidates, MOST_COUNTED)
    counts, depths = rng.integers(1, most + 1, len(boxes)).tolist(), spread(rng, len(boxes))
    needles = tuple(
        Needle((f" Box {box}:", *([one.item] * number), "."), place)
        for box, one, number, place in zip(boxes, chosen, counts, depths, strict=True)
    )
    answers = [str(number) for number in counts]
    every = [str(number) for number in range(1, most + 1)]
    choices = []
    for place, right in enumerate(answers):
        choice = ranked(every, [right], rng)
        lead = (*listed(answers[:place]), ",") if place else ()
        choices.append(Choice(choice.candidates, choice.right, lead))
    question = f" How many {phrases.plural} are in box {enumerated(boxes)}? The numbers are:"
    return Probe(f"{name}_count", needles, (question,), tuple(choices), tuple(answers), tuple(depths), listed(answers))


def picture_sound(
    name: str, config: NeedleConfig, media: Media, rng: np.random.Generator, depth: float | None
) -> Probe:
    """What is heard in the clip that belongs to the picture of a key: key to picture at one place, picture to clip at another."""
    pictures = draw(media["image"], config.needles, rng, "pictures")
    clips = draw(media["audio"], max(config.candidates, config.needles), rng, "recordings")
    names = keys(rng, config.needles)
    needles: list[Needle] = []
    for number, (word, picture, clip) in enumerate(zip(names, pictures, clips, strict=False)):
        first, second = rng.permutation(rng.random(2)).tolist()
        needles += [
            Needle((f" The picture of {word}:", picture.item, "."), first, number == 0),
            Needle((" To this picture", picture.item, " belongs this recording:", clip.item, "."), second, number == 0),
        ]
    question = f" What is heard in the recording that belongs to the picture of {names[0]}? It is:"
    earliest = min(needle.depth for needle in needles[:2])
    return _named("picture_sound", tuple(needles), question, clips[: config.candidates], earliest, rng)


def draw(pool: Sequence[Named], number: int, rng: np.random.Generator, plural: str) -> list[Named]:
    """So many pictures or clips, no name the beginning of another or a part of it in whole words.

    Raises:
        Lacking: there are not so many.
    """
    chosen: list[Named] = []
    for place in rng.permutation(len(pool)).tolist():
        if len(chosen) == number:
            break
        name = _padded(pool[place].name)
        taken = [_padded(one.name) for one in chosen]
        if not any(name in other or other in name or _begins(name, other) for other in taken):
            chosen.append(pool[place])
    if len(chosen) < number:
        raise Lacking(f"needs {number} {plural} with names of their own; the held-out samples have {len(chosen)}")
    return chosen


def _padded(name: str) -> str:
    return f" {name.lower()} "


def _begins(one: str, other: str) -> bool:
    one, other = one.rstrip(), other.rstrip()
    return one.startswith(other) or other.startswith(one)


def _named(
    kind: str,
    needles: tuple[Needle, ...],
    question: str,
    chosen: Sequence[Named],
    depth: float,
    rng: np.random.Generator,
) -> Probe:
    """The first of `chosen` is the right one."""
    names = [one.name for one in chosen]
    return Probe(
        kind,
        needles,
        (question,),
        (ranked(names, names[:1], rng),),
        (names[0],),
        (depth,),
        (f" {names[0]}",),
        avoid=tuple(names),
    )


MEDIA_KINDS: dict[str, tuple[Callable[..., Probe], str, bool, str]] = {
    "picture": (shown, "picture", True, "contains"),
    "picture_value": (value, "picture", True, "contains"),
    "picture_key": (key, "picture", True, "contains"),
    "picture_count": (count, "picture", False, "positions"),
    "sound": (shown, "sound", True, "contains"),
    "sound_value": (value, "sound", True, "contains"),
    "sound_key": (key, "sound", True, "contains"),
    "sound_count": (count, "sound", False, "positions"),
    "picture_sound": (picture_sound, "picture", False, "contains"),
}
"""Each maker, its modality, whether what it asks stands at a depth of the grid, and its grader."""
NEEDS = {
    name: ("image", "audio") if name == "picture_sound" else (PHRASES[of].kind,)
    for name, (_, of, *_) in MEDIA_KINDS.items()
}
"""Modalities of each kind."""
