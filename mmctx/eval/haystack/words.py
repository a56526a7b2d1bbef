"""Keys, numbers and words of needles, drawn at random."""

from __future__ import annotations

import numpy as np

ADJECTIVES = tuple(
    "able bold brave brief bright broad calm clean clear cold cool dark deep dry early fair fast fine firm "  # noqa: SIM905
    "flat fresh gentle glad good grand great happy hard high honest kind large late light long loud neat new "
    "old plain proud quick quiet rare rich round".split()
)
NOUNS = tuple(
    "anchor apple arrow basket bell boat book bottle bridge bucket button candle carpet castle chair circle "  # noqa: SIM905
    "clock cloud coat corner curtain desk door engine feather fence field flag flower forest garden gate "
    "glass hammer harbor helmet island jacket kettle ladder lake lamp letter mirror mountain needle ocean "
    "orange oven paper pencil piano pillow pocket river road saddle shelf shirt shovel silver spoon stone "
    "table tower train tunnel valley wagon wheel window winter".split()
)
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys such as `quiet-harbor`, as RULER's."""
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False).tolist()
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in chosen]


def numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Different whole numbers of so many digits, the first not zero."""
    low, high = 10 ** (digits - 1), 10**digits
    found: dict[int, None] = {}
    while len(found) < count:
        found[int(rng.integers(low, high))] = None
    return list(map(str, found))


def plain_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words: nouns, and beyond them keys."""
    words = [NOUNS[n] for n in rng.permutation(len(NOUNS)).tolist()]
    return [*words, *keys(rng, max(count - len(words), 0))][:count]


def coded_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words that mean nothing, such as `bakomi`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(_SYLLABLES[n] for n in rng.integers(len(_SYLLABLES), size=3))] = None
    return list(found)


def variables(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of five capital letters, as RULER's."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(65 + n) for n in rng.integers(26, size=5))] = None
    return list(found)


def spread(rng: np.random.Generator, count: int) -> list[float]:
    """Depths in rising order, one in each of so many equal stretches."""
    return ((np.arange(count) + rng.random(count)) / count).tolist()


def listed(values: list[str]) -> tuple[str, ...]:
    """Values as an answer lists them, each a text of its own: ` a`, `,`, ` b`."""
    return tuple(text for n, value in enumerate(values) for text in ((",", f" {value}") if n else (f" {value}",)))


def enumerated(values: list[str]) -> str:
    """`a, b and c`."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"
