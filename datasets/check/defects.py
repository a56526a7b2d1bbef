"""The words that `mmctx data check` has for what it finds, how grave each is, and the limits that decide. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmctx.datasets.shards.contents import REASONS

Level = Literal["error", "warning", "info"]

_SAMPLE_ERRORS = {
    "undecodable_image": "a picture cannot be decoded to its last pixel",
    "undecodable_audio": "a clip cannot be decoded to its last sample",
    "missing_member": "an interleaved document names a member that is not there",
    "bad_json": "the json member does not parse, or holds something else where text or segments should be",
    "bad_text": "a text is not UTF-8",
    "bad_audio": "a clip holds NaN or infinite values",
    "empty": "a blank text, a clip of no samples, or nothing to train on at all",
    "duplicate_member": "two members with one extension, or two pictures or clips where one is expected",
    "duplicate_key": "a key occurs twice in one shard: the members of a sample do not stand together",
    "oversized_image": "a picture beyond the limit of pixels, or far too many for its bytes (a decompression bomb)",
    "oversized_audio": "a clip beyond the limit of seconds, or far too many for its bytes (a decompression bomb)",
    "absurd_rate": "a clip whose sample rate no recording has",
    "over_long": "a text has more tokens than the context holds",
    "placeholder_mismatch": "the text holds another number of media placeholders than the sample has media",
}
_SHARD_ERRORS = {
    "unreadable": "a shard that is empty or cannot be opened",
    "no_samples": "a shard without a single sample",
    "compressed": "a compressed tar: its samples cannot be read by offset",
    "truncated": "a shard that was cut short",
    "bad_header": "a damaged header: what follows cannot be read",
}
_WARNINGS = {
    "no_end": "a tar without its closing blocks: it may have been cut between two members",
    "trailing_data": "bytes after the end of the archive, which nobody reads (joined tars?)",
    "repeated_key": "a key that an earlier shard of the source has too",
    "missing_text": "a declared text that neighbours have is absent",
    "missing_media": "no picture or no clip, where most neighbours have one",
    "mixed_layout": "other members than most of the shard, or interleaved among plain samples",
    "unused_media": "a picture or clip that no segment names",
    "unread_media": "a picture, clip or video of a format that is not read",
    "wrong_extension": "the content is of another format than the extension says; it is read as what it is",
    "exif_orientation": "EXIF asks for a rotation, pixels are read as stored",
    "silent_audio": "a clip that is silent",
    "clipped_audio": "a clip that is cut off at full scale",
    "special_token": "a special token of the tokenizer is written out in a text; it is read as plain characters",
}
_INFOS = {
    "odd_name": "a member's name with upper-case extension, white space, control or non-UTF-8 characters",
    "ignored_member": "a member that belongs to no sample: hidden, or without extension",
}


class Defect(NamedTuple):
    """What one word means.

    Attributes:
        level: ``error``: the sample (or the whole shard) cannot be used; ``warning``: it can, but somebody should look.
        meaning: one line.
    """

    level: Level
    meaning: str


_LEVELS: dict[Level, dict[str, str]] = {"error": _SAMPLE_ERRORS | _SHARD_ERRORS, "warning": _WARNINGS, "info": _INFOS}

DEFECTS = {word: Defect(level, meaning) for level, words in _LEVELS.items() for word, meaning in words.items()}
"""All defects, gravest first. Those of samples that cannot be used are words of `contents.REASONS`."""

assert set(_SAMPLE_ERRORS) == set(REASONS) - {"ok", "quarantined", "other_length"}  # the last is what a check leads to


class Finding(NamedTuple):
    """One defect at one place.

    Attributes:
        shard: path.
        number: of the sample in the shard, -1 for a defect of the shard as a whole or of a member outside samples.
        key: of the sample, empty for the shard as a whole.
        defect: a word of `DEFECTS`.
        detail: what exactly was found.
    """

    shard: str
    number: int
    key: str
    defect: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckLimits:
    """Where a size or a level becomes a defect.

    Attributes:
        max_pixels: of a picture; Pillow warns beyond the same number.
        max_seconds: of a clip.
        max_ratio: decoded bytes for each stored byte; only what decodes to more than 64 MiB is held to it.
        min_rate: samples a second of a clip at least.
        max_rate: samples a second of a clip at most; studio converters end at 768 kHz.
        silence: root mean square below which a clip is silent (full scale is 1): 1e-4 is -80 dB.
        clipped: share of samples that are cut off at full scale from which a clip is clipped.
    """

    max_pixels: int = 89_478_485
    max_seconds: float = 7200.0
    max_ratio: float = 1000.0
    min_rate: int = 2_000
    max_rate: int = 768_000
    silence: float = 1e-4
    clipped: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """What texts are held to.

    Attributes:
        texts: where texts stand, as the source declares them.
        context_length: tokens that one document may have; None for no limit.
        special_tokens: strings that the tokenizer reserves.
        placeholders: kind of media -> the string that stands for it.
    """

    texts: tuple[str, ...]
    context_length: int | None
    special_tokens: tuple[str, ...]
    placeholders: dict[str, str]
