"""A page about one shard: its samples as cards, with what they hold, where they lie and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmctx.datasets.check.defects import DEFECTS, CheckLimits, TextRules
from mmctx.datasets.check.sample import check_sample
from mmctx.datasets.check.shard import open_members
from mmctx.datasets.shards.contents import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    check_texts,
    parse_json,
    parse_segments,
    read_text,
)
from mmctx.datasets.shards.measure import MemberReader
from mmctx.datasets.shards.tar import TarMember, TarSample, group_samples, scan_tar
from mmctx.datasets.view.media import clip_spectrogram, clip_uri, picture_uri
from mmctx.datasets.view.render import render
from mmctx.errors import DataError, MmctxError, SampleError

_LONGEST_TEXT = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing of a sample that the page shows.

    Attributes:
        kind: ``text``, ``image`` or ``audio``.
        name: where it stands: a member's extension, or a text's declaration.
        text: of a text.
        uri: of a picture, or of a clip that is embedded.
        spectrogram: of a clip.
        about: size, length, rate.
        problem: why it is not shown.
    """

    kind: str
    name: str
    text: str = ""
    uri: str = ""
    spectrogram: str = ""
    about: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One sample.

    Attributes:
        number: in the shard.
        key: of the sample.
        start: first byte in the shard.
        end: one past its last byte.
        interleaved: whether `parts` are the segments of a document, in reading order.
        parts: pictures, clips and texts.
        members: (name, bytes) of each member.
        json: the json member, indented; empty if there is none.
        problems: (defect, level, detail) of each.
    """

    number: int
    key: str
    start: int
    end: int
    interleaved: bool
    parts: list[Part]
    members: list[tuple[str, int]]
    json: str
    problems: list[tuple[str, str, str]]


def shard_page(path: Path, texts: Sequence[str], start: int = 0, limit: int = 50) -> str:
    """A self-contained page of `limit` samples of a shard, from sample number `start` on.

    Args:
        path: of the shard; of a damaged one, the samples before the damage are shown.
        texts: where texts stand, such as ``txt`` or ``json:names.zh``.
        start: number of the first sample.
        limit: samples at most.

    Raises:
        DataError: the shard is missing, or its first header is damaged.
        ConfigError: `texts` has a malformed entry.
    """
    rules = TextRules(texts=check_texts(texts), context_length=None, special_tokens=(), placeholders={})
    members: list[TarMember] = []
    damage = ""
    try:
        for member in scan_tar(path):
            members.append(member)  # one by one: those before a damage stay
    except DataError as error:
        damage = str(error)
        if not members:
            raise
    samples = list(group_samples(members))
    with open_members(path) as reader:
        chosen = list(enumerate(samples))[start : start + limit]
        cards = [_card(number, sample, reader, rules) for number, sample in chosen]
    return render(
        "shard.html.jinja",
        title=path.name,
        path=str(path),
        damage=damage,
        cards=cards,
        num_samples=len(samples),
        num_bytes=path.stat().st_size,
        num_problems=sum(bool(card.problems) for card in cards),
        start=start,
    )


def _card(number: int, sample: TarSample, reader: MemberReader, rules: TextRules) -> Card:
    found = check_sample(sample, reader, rules, CheckLimits(), None)
    contents = {extension: reader.read(member) for extension, member in sample.members}
    segments, pretty = None, ""
    try:
        document = parse_json(contents)
        pretty = "" if document is None else json.dumps(document, indent=2, ensure_ascii=False)
        segments = parse_segments(document)
    except SampleError:
        document = None
        pretty = pretty or contents["json"].decode("utf-8", "backslashreplace")
    if segments is not None:
        parts = [
            Part(kind="text", name="text", text=segment.value)
            if segment.kind == "text"
            else _media(segment.kind, segment.value, contents)
            for segment in segments
        ]
    else:
        kinds = (("image", IMAGE_EXTENSIONS), ("audio", AUDIO_EXTENSIONS))
        parts = [_media(kind, name, contents) for kind, known in kinds for name in contents if name in known]
        parts += [part for entry in rules.texts if (part := _text(entry, contents, document)) is not None]
    return Card(
        number=number,
        key=sample.key,
        start=sample.start,
        end=sample.end,
        interleaved=segments is not None,
        parts=parts,
        members=[(extension, member.size) for extension, member in sample.members],
        json=pretty[:_LONGEST_TEXT],
        problems=[(defect, DEFECTS[defect].level, detail) for defect, detail in found.defects],
    )


def _text(entry: str, contents: dict[str, bytes], document: Any) -> Part | None:
    try:
        text = read_text(entry, contents, document)
    except SampleError:  # the card's problems say why
        return Part(
            kind="text", name=entry, text=contents.get(entry, b"").decode("utf-8", "backslashreplace")[:_LONGEST_TEXT]
        )
    return None if text is None else Part(kind="text", name=entry, text=text[:_LONGEST_TEXT])


def _media(kind: str, name: str, contents: dict[str, bytes]) -> Part:
    data = contents.get(name)
    if data is None:
        return Part(kind=kind, name=name, problem="the member is not there")
    try:
        if kind == "image":
            uri, width, height = picture_uri(data, CheckLimits().max_pixels)
            return Part(kind=kind, name=name, uri=uri, about=f"{width} × {height}")
        spectrogram, seconds, rate = clip_spectrogram(data)
    except MmctxError as error:
        return Part(kind=kind, name=name, problem=str(error))
    uri = clip_uri(name, data)
    about = f"{seconds:.2f} s, {rate:,} Hz" + (
        "" if uri else ", cannot be played here: too large, or of a rate that browsers refuse"
    )
    return Part(kind=kind, name=name, uri=uri, spectrogram=spectrogram, about=about)
