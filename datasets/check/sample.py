"""Checks one sample: names, members, media, texts. Reads it through `contents.py`, as the index and the decoder do. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmctx.datasets.check.defects import DEFECTS, CheckLimits, TextRules
from mmctx.datasets.check.media import MediaDefect, check_audio, check_image
from mmctx.datasets.shards.contents import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    Segment,
    media_of,
    parse_json,
    parse_segments,
    read_text,
    text_members,
)
from mmctx.datasets.shards.measure import MemberReader
from mmctx.datasets.shards.tar import TarMember, TarSample
from mmctx.datasets.shards.tokens import TokenCounter
from mmctx.errors import SampleError

_READ = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}
_UNREAD = frozenset(  # media of formats that mmctx does not read
    "aac aif aiff amr avi avif bmp flv gif heic heif jp2 jxl m4a m4v mkv mov mp4 mpg opus tif tiff webm wma".split()  # noqa: SIM905
)

INTERLEAVED = "interleaved"


class SampleCheck(NamedTuple):
    """What was found in one sample.

    Attributes:
        defects: in the order of the checks.
        layout: which kinds of members it has: ``image``, ``audio`` and other extensions, or `INTERLEAVED` alone; None
            where that cannot be told.
        lacks: declared texts that it does not have.
    """

    defects: list[MediaDefect]
    layout: frozenset[str] | None
    lacks: tuple[str, ...]


def check_sample(
    sample: TarSample, reader: MemberReader, rules: TextRules, limits: CheckLimits, counter: TokenCounter | None
) -> SampleCheck:
    """Decodes all of a sample and lists its defects; one that spoils the sample does not hide the others.

    Raises:
        DataError: the shard changed while it was read.
    """
    members = dict(sample.members)
    defects = [*_odd_names(sample.members), *_unread_members(members)]
    if len(members) < len(sample.members):
        names = [extension for extension, _ in sample.members]
        repeated = next(name for name in names if names.count(name) > 1)
        defects.append(MediaDefect("duplicate_member", f"two members with extension {repeated!r}"))
        return SampleCheck(defects, None, ())
    try:
        wanted = text_members(rules.texts)
        contents = {name: reader.read(member) for name, member in members.items() if name in wanted}
        document = parse_json(contents)
        segments = parse_segments(document)
    except SampleError as error:
        defects.append(MediaDefect(error.reason, error.detail))
        return SampleCheck(defects, None, ())
    media = _present_media(members, segments, defects)
    for kind, name, *_ in dict.fromkeys(media):  # a book may show one member twice
        check = check_image if kind == "image" else check_audio
        defects += check(reader.open(members[name]), members[name].size, name, limits)
    texts, lacks = _texts(contents, document, segments, rules.texts, defects)
    defects += _check_texts(texts, media, rules, counter)
    if not media and not texts and all(DEFECTS[defect.defect].level != "error" for defect in defects):
        found = f"no media and none of the texts {', '.join(rules.texts)}; members: {', '.join(members)}"
        defects.append(MediaDefect("empty", found))
    return SampleCheck(defects, _layout(members, segments), lacks)


def _odd_names(members: Sequence[tuple[str, TarMember]]) -> Iterator[MediaDefect]:
    for extension, member in members:
        name = member.name
        if not name.endswith(extension):
            yield MediaDefect("odd_name", f"{name!r}: the extension is in upper case and read as {extension!r}")
        elif not name.isprintable() or any(c.isspace() for c in name) or "\\" in name or "�" in name:
            yield MediaDefect("odd_name", f"{name!r}: white space, control or non-UTF-8 characters")
        elif name.startswith("/") or ".." in name.split("/"):
            yield MediaDefect("odd_name", f"{name!r}: leads out of the folder where it would be unpacked")


def _unread_members(members: Mapping[str, TarMember]) -> Iterator[MediaDefect]:
    for extension in members:
        if _is_unread(extension):
            known = ", ".join((*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS))
            yield MediaDefect("unread_media", f"{extension}: media are read from {known}")


def _is_unread(extension: str) -> bool:
    return extension.rpartition(".")[2] in _UNREAD


def _present_media(
    members: Mapping[str, TarMember], segments: Sequence[Segment] | None, defects: list[MediaDefect]
) -> list[Segment]:
    """Media to decode, as `media_of` says, or all that is there where it refuses; notes what is amiss in `defects`."""
    try:
        media = media_of(members, segments)
    except SampleError as error:
        defects.append(MediaDefect(error.reason, error.detail))
        if segments is not None:
            return [s for s in segments if s.kind != "text" and s.value in members and _kind(s.value) == s.kind]
        return [Segment(kind, name) for name in members for kind in _READ if name in _READ[kind]]
    used = {segment.value for segment in media}
    for name in members:
        if _kind(name) is not None and name not in used:
            why = "no segment names it" if segments is not None else "a plain sample has KEY.png, without more dots"
            defects.append(MediaDefect("unused_media", f"{name}: {why}"))
    for segment in media:
        if _kind(segment.value) != segment.kind:
            known = ", ".join(_READ[segment.kind])
            defects.append(
                MediaDefect(
                    f"undecodable_{segment.kind}", f"{segment.value} is named as {segment.kind}; read are {known}"
                )
            )
    return [segment for segment in media if _kind(segment.value) == segment.kind]


def _kind(extension: str) -> str | None:
    suffix = extension.rpartition(".")[2]
    return next((kind for kind, known in _READ.items() if suffix in known), None)


def _texts(
    contents: Mapping[str, bytes],
    document: Any,
    segments: Sequence[Segment] | None,
    declared: Sequence[str],
    defects: list[MediaDefect],
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Pieces of each text by where it stands, and the declared ones that are absent; notes bad ones in `defects`."""
    if segments is not None:
        return {"segments": [s.value for s in segments if s.kind == "text"]}, ()
    texts: dict[str, list[str]] = {}
    lacks = []
    for entry in declared:
        try:
            text = read_text(entry, contents, document)
        except SampleError as error:
            defects.append(MediaDefect(error.reason, error.detail))
            continue
        if text is None:
            lacks.append(entry)
        else:
            texts[entry] = [text]
    return texts, tuple(lacks)


def _check_texts(
    texts: Mapping[str, Sequence[str]], media: Sequence[Segment], rules: TextRules, counter: TokenCounter | None
) -> Iterator[MediaDefect]:
    for entry, pieces in texts.items():
        yield from _check_reserved(entry, pieces, media, rules)
        if counter is None or not pieces:
            continue
        num_tokens = sum(counter.count(pieces))
        if not num_tokens and not media:
            yield MediaDefect("empty", f"{entry}: the tokenizer makes 0 tokens of {''.join(pieces)[:40]!r}")
        elif rules.context_length is not None and num_tokens > rules.context_length:
            yield MediaDefect(
                "over_long", f"{entry}: {num_tokens:,} tokens, the context holds {rules.context_length:,}"
            )


def _check_reserved(
    entry: str, pieces: Sequence[str], media: Sequence[Segment], rules: TextRules
) -> Iterator[MediaDefect]:
    """Placeholders that do not match the media, else any special token that is written out."""
    for kind, placeholder in rules.placeholders.items():
        written = sum(piece.count(placeholder) for piece in pieces)
        present = sum(segment.kind == kind for segment in media)
        if written and written != present:
            yield MediaDefect(
                "placeholder_mismatch", f"{entry}: {placeholder!r} is written {written} times, the sample has {present}"
            )
            return
    found = [token for token in rules.special_tokens if any(token in piece for piece in pieces)]
    if found:
        yield MediaDefect("special_token", f"{entry}: {', '.join(map(repr, found))}")


def _layout(members: Mapping[str, TarMember], segments: Sequence[Segment] | None) -> frozenset[str]:
    if segments is not None:
        return frozenset([INTERLEAVED])
    kinds = {name: next((kind for kind in _READ if name in _READ[kind]), None) for name in members}
    # media that are not read have a defect of their own
    others = {name for name, kind in kinds.items() if kind is None and _kind(name) is None and not _is_unread(name)}
    return frozenset(kind for kind in kinds.values() if kind is not None) | others
