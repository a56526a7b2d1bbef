"""What recall documents are made of: four vocabularies that share no word, small pictures, and the tokenizer of them all."""

from __future__ import annotations

import colorsys
import io
import itertools
from pathlib import Path

from PIL import Image, ImageDraw

KINDS = ("recall", "needle", "picture")
"""Kinds of facts: a key and its value among many; the code of a name; a picture and its value."""
SHOWN = "shown"
"""A further kind, where it is asked for: a key whose value is shown as a picture, and asked as the value that the picture stands for."""

_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
KEYS = tuple(a + b for a, b in itertools.product(_SYLLABLES[:16], _SYLLABLES[16:24]))
"""Keys of associative recall, such as `bado`."""
NAMES = tuple((a + b + "x").capitalize() for a, b in itertools.product(_SYLLABLES[:12], _SYLLABLES[12:24]))[:128]
"""Names whose code is a needle, such as `Baknox`."""
VALUES = tuple(f"{number:02d}" for number in range(32))
"""Values of every kind of fact."""
FILLER = tuple(
    "the rain came down over fields and hills while people walked home slowly under grey skies past old stone walls "  # noqa: SIM905
    "where birds slept until morning light".split()
)
"""Words between the facts."""
CODE = ("a", "code", "for")
"""What comes before a name."""

PICTURE_SIZE = 32
_SHAPES = ("disc", "ring", "square", "frame", "cross", "bars", "triangle", "diamond")
_COLORS = 12
NUM_PICTURES = len(_SHAPES) * _COLORS
FIRST_SHOWN = NUM_PICTURES // 2
"""Where there are facts of kind `SHOWN`, pictures from here on are values, those before it keys."""


def value_shown(number: int) -> str:
    """What picture `number` stands for where it is a value: the same in all documents."""
    return VALUES[number % len(VALUES)]


def draw_picture(number: int) -> bytes:
    """Picture `number` as a PNG of `PICTURE_SIZE` pixels squared: one of eight shapes in one of twelve colours, on white."""
    shape, color = _SHAPES[number % len(_SHAPES)], number // len(_SHAPES)
    hue, value = (color % 6) / 6, (0.95, 0.5)[color // 6]
    fill = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1.0, value))
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
    _draw(ImageDraw.Draw(picture), shape, fill, PICTURE_SIZE - 1)
    png = io.BytesIO()
    picture.save(png, "png")
    return png.getvalue()


def _draw(pen: ImageDraw.ImageDraw, shape: str, fill: tuple[int, ...], side: int) -> None:
    low, high, middle, bar = side // 8, side - side // 8, side // 2, side // 5
    whole = (low, low, high, high)
    match shape:
        case "disc":
            pen.ellipse(whole, fill=fill)
        case "ring":
            pen.ellipse(whole, outline=fill, width=bar)
        case "square":
            pen.rectangle(whole, fill=fill)
        case "frame":
            pen.rectangle(whole, outline=fill, width=bar)
        case "cross":
            pen.rectangle((low, middle - bar // 2, high, middle + bar // 2), fill=fill)
            pen.rectangle((middle - bar // 2, low, middle + bar // 2, high), fill=fill)
        case "bars":
            for left in range(low, high, 2 * bar):
                pen.rectangle((left, low, left + bar, high), fill=fill)
        case "triangle":
            pen.polygon([(middle, low), (high, high), (low, high)], fill=fill)
        case "diamond":
            pen.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=fill)


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer that knows these words and makes one token of each, as `AutoTokenizer` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # slow to import

    words = ["<|endoftext|>", "<|unknown|>", *CODE, *FILLER, *VALUES, *NAMES, *KEYS]
    assert len(set(words)) == len(words), "every word once"
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # type: ignore[assignment]  # puts spaces between words
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        unk_token="<|unknown|>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(folder))
