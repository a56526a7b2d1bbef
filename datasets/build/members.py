"""From media and texts of any origin to the members of one WebDataset sample.

A picture or clip goes into the shard byte for byte where training reads its format, is rewritten without loss where
Pillow or libsndfile can (GIF, BMP, TIFF -> PNG; AIFF, AU -> FLAC), and is left out, with the reason, where they cannot.
Runs in worker processes, so nothing here may import torch (nor webdataset, which does).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import soundfile
from PIL import Image

from mmctx.datasets.shards.contents import IMAGE_FORMATS, audio_size, complaint, image_size
from mmctx.errors import SampleError

# fmt: off
# fmt: off
IMAGE_SUFFIXES = frozenset((
    "jpg", "jpeg", "jpe", "jfif", "png", "webp",
    "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif", "tga", "ico",
))
AUDIO_SUFFIXES = frozenset(("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "au", "snd", "caf"))
# fmt: on
"""Of file names, lower-cased: what is taken for a picture or a clip. What a file really holds is found out from its bytes."""

_IMAGE_MEMBERS = dict(zip(IMAGE_FORMATS, ("jpg", "png", "webp"), strict=True)) | {"MPO": "jpg"}  # MPO: JPEG of cameras
_AUDIO_MEMBERS = {"WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3", "MPEG": "mp3"}
_PNG_MODES = ("1", "L", "I;16", "RGB", "RGBA")
_FLAC_SUBTYPES = ("PCM_S8", "PCM_16", "PCM_24")

Members = dict[str, str | bytes]
"""``__key__`` and the bytes of each member by extension."""


class LeftOut(NamedTuple):
    """Something that does not reach the shards.

    Attributes:
        key: the sample, file or row.
        reason: a short fixed word that the summary counts by.
        detail: what was found, and the remedy where there is one.
    """

    key: str
    reason: str
    detail: str


class Rendered(NamedTuple):
    """What became of one item: its members, None where nothing could be used, and what was left out of it."""

    members: Members | None
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or clip that has not been read yet; small enough to hand to a worker unless it carries `data`.

    Attributes:
        kind: ``image`` or ``audio``.
        name: what its source calls it; errors do too.
        path: the file that holds it.
        span: (offset, size) inside the file; None for all of it.
        data: its bytes, where they are known already.
    """

    kind: Literal["image", "audio"]
    name: str
    path: str | None = None
    span: tuple[int, int] | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """All its bytes.

        Raises:
            SampleError: ``missing_file``, ``unreadable_file``.
        """
        if self.data is not None:
            return self.data
        if self.path is None:
            raise SampleError("missing_file", f"{self.name}: not found")
        try:
            with open(self.path, "rb") as file:
                if self.span is None:
                    return file.read()
                file.seek(self.span[0])
                return file.read(self.span[1])
        except FileNotFoundError:
            raise SampleError("missing_file", f"{self.name}: no file {self.path}") from None
        except OSError as error:
            raise SampleError("unreadable_file", f"{self.name}: {self.path}: {error.strerror}") from None

    def member(self) -> tuple[str, bytes]:
        """(extension, bytes) as they go into a shard.

        Raises:
            SampleError: it cannot be read, is damaged, or has a format that cannot be rewritten.
        """
        data = self.read()
        convert = image_member if self.kind == "image" else audio_member
        try:
            return convert(data)
        except SampleError as error:
            raise SampleError(error.reason, f"{self.name}: {error.detail}") from None


def kind_of(name: str) -> Literal["image", "audio"] | None:
    """What the suffix of a file name promises; None for neither."""
    suffix = os.path.splitext(name)[1][1:].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None


def image_member(data: bytes) -> tuple[str, bytes]:
    """(extension, bytes) of a picture: as it is if JPEG, PNG or WebP, else as a PNG of its first frame.

    Raises:
        SampleError: ``undecodable_image``, ``unsupported_format``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or "?"
            if kind in _IMAGE_MEMBERS:
                if kind not in IMAGE_FORMATS:
                    image_size(io.BytesIO(data))  # as the index will read it
                return _IMAGE_MEMBERS[kind], data
            if image.mode == "F" or image.mode == "I":
                raise SampleError("unsupported_format", f"{kind} of mode {image.mode}: more than 16 bits a channel")
            if image.mode not in _PNG_MODES:
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            png = io.BytesIO()
            image.save(png, "png", icc_profile=None)
            return "png", png.getvalue()
    except SampleError:
        raise
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise SampleError("undecodable_image", complaint(error)) from None


def audio_member(data: bytes) -> tuple[str, bytes]:
    """(extension, bytes) of a clip: as it is if WAV, FLAC, Ogg or MP3, else as FLAC where that loses nothing.

    Raises:
        SampleError: ``undecodable_audio``, ``empty``, ``unsupported_format``.
    """
    audio_size(io.BytesIO(data))
    with soundfile.SoundFile(io.BytesIO(data)) as clip:
        if clip.format in _AUDIO_MEMBERS:
            return _AUDIO_MEMBERS[clip.format], data
        if clip.subtype not in _FLAC_SUBTYPES:
            found = f"{clip.format} of {clip.subtype} samples"
            raise SampleError("unsupported_format", f"{found}: convert it to FLAC, WAV, Ogg or MP3")
        values, rate, subtype = clip.read(dtype="int32"), clip.samplerate, clip.subtype
    flac = io.BytesIO()
    try:
        soundfile.write(flac, values, rate, format="FLAC", subtype=subtype)
    except Exception as error:  # a rate or a number of channels that FLAC does not have
        raise SampleError("unsupported_format", complaint(error)) from None
    return "flac", flac.getvalue()


def plain_sample(
    key: str, media: Iterable[Medium], text: str | None, facts: Mapping[str, Any] | None = None
) -> Rendered:
    """A pair or triple: one member for each medium, ``txt`` and, if there are `facts`, ``json``.

    A medium that cannot be used takes the whole sample with it: half a pair teaches nothing.
    """
    members: Members = {"__key__": key}
    kinds: dict[str, str] = {}
    try:
        for medium in media:
            if medium.kind in kinds:
                raise SampleError(
                    "duplicate_member", f"expected one {medium.kind}, found {kinds[medium.kind]} and {medium.name}"
                )
            kinds[medium.kind] = medium.name
            extension, data = medium.member()
            members[extension] = data
    except SampleError as error:
        return Rendered(None, (LeftOut(key, error.reason, error.detail),))
    if text is not None:
        if not text.strip():
            return Rendered(None, (LeftOut(key, "empty", "the text is blank"),))
        members["txt"] = encode_text(text)
    if facts:  # a key of this name would make the sample a document
        renamed = {"segments_column" if name == "segments" else name: value for name, value in facts.items()}
        members["json"] = encode_json(renamed)
    if members.keys() <= {"__key__", "json"}:
        return Rendered(None, (LeftOut(key, "empty", "neither media nor text"),))
    return Rendered(members)


def interleaved_sample(
    key: str, parts: Sequence[str | Medium | LeftOut], facts: Mapping[str, Any] | None = None
) -> Rendered:
    """A document of texts and media in reading order, as ``{"segments": [...]}`` with members to match.

    Neighbouring texts become one segment. Media that cannot be used are left out of the document, which goes with them
    only if nothing is left.
    """
    members: Members = {"__key__": key}
    segments: list[dict[str, str]] = []
    left_out: list[LeftOut] = []
    for part in parts:
        if isinstance(part, LeftOut):
            left_out.append(part)
        elif isinstance(part, str):
            if segments and "text" in segments[-1]:
                segments[-1]["text"] += part
            elif part:
                segments.append({"text": part})
        else:
            try:
                extension, data = part.member()
            except SampleError as error:
                left_out.append(LeftOut(key, error.reason, error.detail))
                continue
            name = f"{len(members) - 1}.{extension}"
            members[name] = data
            segments.append({part.kind: name})
    if len(members) == 1 and not any(segment["text"].strip() for segment in segments):
        left_out.append(LeftOut(key, "empty", f"none of its {len(parts)} parts can be used"))
        return Rendered(None, tuple(left_out))
    members["json"] = encode_json({**(facts or {}), "segments": segments})
    return Rendered(members, tuple(left_out))


def encode_text(text: str) -> bytes:
    """UTF-8; a lone surrogate, which no text encoding has, becomes the replacement character."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()


def encode_json(facts: Any) -> bytes:
    """JSON with what JSON lacks (dates, decimals) as strings."""
    return encode_text(json.dumps(facts, ensure_ascii=False, default=str))


def safe_key(name: str) -> str:
    """`name` as a WebDataset key: dots of the last part, which would end the key, and names that mean something else there are escaped.

    Different names give different keys; ``/`` still separates folders.
    """
    folder, slash, base = name.strip("/").rpartition("/")
    base = base.replace("%", "%25").replace(".", "%2E") or "%"
    key = folder.replace("%", "%25") + slash + base
    return "%5F" + key[1:] if key.startswith("__") else key
