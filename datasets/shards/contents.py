"""What the members of a sample mean: its pictures, clips, texts and, for an interleaved document, their order.

The index and the decoder both read samples through this file, so that they cannot disagree. It imports no torch:
index workers start fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import soundfile
from PIL import Image

from mmctx.chat import ChatTemplate
from mmctx.errors import ConfigError, SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "mp3")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""Pillow's names of the formats that are read, whatever the extension says."""

REASONS = (
    "ok",
    "undecodable_image",
    "undecodable_audio",
    "missing_member",  # an interleaved document names a member that is not there
    "bad_json",
    "bad_text",  # not UTF-8
    "bad_audio",  # NaN or infinite; seen only when decoded
    "empty",  # blank text, a clip of no samples, or nothing to train on at all
    "duplicate_member",  # two members with one extension, or two pictures where one is expected
    "duplicate_key",  # members of one sample do not stand next to each other
    "over_long",  # documents longer than the context, or media that do not fit into a bin; known only to a plan
    "quarantined",  # listed in the run's quarantine file
    # From here on: found by `mmctx data check` alone, which decodes everything; known to a run by its quarantine list.
    "oversized_image",
    "oversized_audio",
    "absurd_rate",
    "placeholder_mismatch",
    "other_length",  # outside the `lengths` of its source: left to another source or stage; known only to a plan
)
"""Why a sample cannot be used. The position in this list is the code in an index: append only."""


_NOISE = re.compile(r"^\S+, \S+\.cpp:\d+, | <_io\.\w+[^>]*>")


class Problem(NamedTuple):
    """Why one sample cannot be used.

    Attributes:
        key: of the sample.
        reason: one of `REASONS`.
        detail: what was found.
    """

    key: str
    reason: str
    detail: str


class Segment(NamedTuple):
    """One piece of an interleaved document.

    Attributes:
        kind: ``text``, ``image`` or ``audio``.
        value: the text itself, or the extension of the member that holds the media.
        learned: causal objectives predict the tokens of this text; False where it is only read.
        control: a text of a chat template: special tokens written out in it are read as such.
    """

    kind: str
    value: str
    learned: bool = True
    control: bool = False


def check_texts(texts: Sequence[str]) -> tuple[str, ...]:
    """Validates text declarations: a member's extension (``txt``) or ``json:`` and a dotted path (``json:names.zh``).

    Raises:
        ConfigError: an entry is neither.
    """
    checked = []
    for entry in texts:
        extension, colon, path = entry.partition(":")
        if not extension or (colon and (extension != "json" or not path)):
            raise ConfigError(
                f"texts: expected a member extension such as 'txt' or 'json:dotted.path', found {entry!r}"
            )
        checked.append(entry if colon else entry.lower())  # as members' extensions are
    return tuple(checked)


def text_members(texts: Sequence[str]) -> set[str]:
    """Extensions that must be read to know the texts of a sample."""
    return {"json"} | {entry for entry in texts if ":" not in entry}


def parse_json(members: Mapping[str, bytes]) -> Any:
    """The content of the ``json`` member, None where there is none.

    Raises:
        SampleError: ``bad_json``.
    """
    data = members.get("json")
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"json: {error}") from None


def parse_segments(document: Any, chat: ChatTemplate | None = None) -> list[Segment] | None:
    """The segments of an interleaved document or of a conversation; None where `document` is neither.

    Args:
        document: content of the ``json`` member.
        chat: of the tokenizer; by default that of tokenizers without one, which names the same media in the same order.

    Raises:
        SampleError: ``bad_json`` where a ``segments`` or ``messages`` key does not hold such, ``empty`` where it holds none.
    """
    if isinstance(document, dict) and "messages" in document:
        return _conversation(document["messages"], chat or ChatTemplate())
    if not isinstance(document, dict) or "segments" not in document:
        return None
    entries = document["segments"]
    if not isinstance(entries, list):
        raise SampleError("bad_json", f"segments should be a list, found {type(entries).__name__}")
    segments = []
    for number, entry in enumerate(entries):
        kinds = sorted(set(entry) - {"loss"}) if isinstance(entry, dict) else [type(entry).__name__]
        if len(kinds) != 1 or kinds[0] not in ("text", "image", "audio") or not isinstance(entry, dict):
            raise SampleError(
                "bad_json", f"segment {number} should have one key: text, image or audio; found {', '.join(kinds)}"
            )
        kind, value = kinds[0], entry[kinds[0]]
        if not isinstance(value, str):
            raise SampleError("bad_json", f"segment {number}: {kind} should be a string, found {type(value).__name__}")
        learned = entry.get("loss", True)
        if not isinstance(learned, bool) or (kind != "text" and "loss" in entry):
            raise SampleError(
                "bad_json",
                f"segment {number}: loss is true or false and belongs to a text, found {learned!r} on {kind}",
            )
        segments.append(Segment(kind, value if kind == "text" else value.lower(), learned))
    if not any(segment.kind != "text" or segment.value.strip() for segment in segments):
        raise SampleError("empty", f"{len(segments)} segments hold neither text nor media")
    return segments


def _conversation(messages: Any, chat: ChatTemplate) -> list[Segment]:
    return [
        Segment(part.kind, part.value if part.kind == "text" else part.value.lower(), part.learned, part.control)
        for part in chat.lay_out(messages)
    ]


def media_of(extensions: Iterable[str], segments: Sequence[Segment] | None) -> list[Segment]:
    """Pictures and clips of a sample: those its segments name, else at most one of each kind by extension.

    Raises:
        SampleError: ``missing_member``, or ``duplicate_member`` where a plain sample has two pictures or two clips.
    """
    present = set(extensions)
    if segments is not None:
        media = [segment for segment in segments if segment.kind != "text"]
        for segment in media:
            if segment.value not in present:
                raise SampleError(
                    "missing_member", f"{segment.kind} {segment.value!r}; members: {', '.join(sorted(present))}"
                )
        return media
    media = []
    for kind, known in (("image", IMAGE_EXTENSIONS), ("audio", AUDIO_EXTENSIONS)):
        found = [extension for extension in known if extension in present]
        if len(found) > 1:
            raise SampleError("duplicate_member", f"expected one {kind}, found {' and '.join(found)}")
        media += [Segment(kind, extension) for extension in found]
    return media


def read_text(entry: str, members: Mapping[str, bytes], document: Any) -> str | None:
    """The text that `entry` declares, None where this sample lacks it.

    Args:
        entry: one of the source's texts, such as ``txt`` or ``json:names.zh``.
        members: at least the members that `text_members` names.
        document: content of the ``json`` member.

    Raises:
        SampleError: ``bad_text``, ``bad_json`` where the path leads to something else than a string, ``empty`` where
            the text is blank.
    """
    if entry.startswith("json:"):
        text = _follow(document, entry)
    else:
        data = members.get(entry)
        try:
            text = None if data is None else data.decode()
        except UnicodeDecodeError as error:
            raise SampleError("bad_text", f"{entry}: {error}") from None
    if text is not None and not text.strip():
        raise SampleError("empty", f"{entry}: the text is blank")
    return text


def _follow(document: Any, entry: str) -> str | None:
    node = document
    for part in entry.removeprefix("json:").split("."):
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    if node is not None and not isinstance(node, str):
        raise SampleError("bad_json", f"{entry} should lead to a string, found {type(node).__name__}")
    return node


def image_size(file: BinaryIO) -> tuple[int, int]:
    """(width, height) from the header alone, as stored: EXIF rotation is not applied.

    Raises:
        SampleError: ``undecodable_image``, also for a picture beyond Pillow's limit on pixels.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return image.size
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise SampleError("undecodable_image", complaint(error)) from None


def audio_size(file: BinaryIO) -> tuple[int, int]:
    """(samples per channel, sample rate in Hz) from the header.

    Raises:
        SampleError: ``undecodable_audio``, ``empty`` for a clip of no samples, ``oversized_audio`` for 2**32 and more.
    """
    try:
        with soundfile.SoundFile(file) as clip:
            num_samples, rate = clip.frames, clip.samplerate
    except Exception as error:  # libsndfile and its Python side raise many types on damaged bytes
        raise SampleError("undecodable_audio", complaint(error)) from None
    if num_samples < 1:
        raise SampleError("empty", "the clip has 0 samples")
    if num_samples >> 32:  # an index holds 32 bits, and only a damaged header claims more
        raise SampleError("oversized_audio", f"the header claims {num_samples:,} samples")
    return num_samples, rate


def complaint(error: Exception) -> str:
    """What a decoder says is wrong, without the addresses and source lines that differ from run to run."""
    text = getattr(error, "error_string", "") or str(error) or type(error).__name__
    return _NOISE.sub("", text)
