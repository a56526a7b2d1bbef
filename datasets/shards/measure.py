"""Measures the samples of one shard from their headers alone. Imports no torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np

from mmctx.datasets.remote.storage import Shard, ShardFile, open_shard
from mmctx.datasets.shards.contents import (
    REASONS,
    Problem,
    audio_size,
    image_size,
    media_of,
    parse_json,
    parse_segments,
)
from mmctx.datasets.shards.tar import TarMember, TarSample, group_samples
from mmctx.errors import DataError, SampleError

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", np.int64),  # byte range in the shard
        ("size", np.int64),
        ("media_start", np.int64),  # rows of the media array
        ("num_media", np.int32),
        ("interleaved", np.uint8),  # 0 plain, 1 an interleaved document
        ("flag", np.uint8),  # code of a reason, 0 where nothing is wrong
    ],
    align=True,
)
MEDIA_DTYPE = np.dtype(
    [
        ("kind", np.uint32),  # position in MEDIA_KINDS
        ("a", np.uint32),  # width; samples per channel
        ("b", np.uint32),  # height; sample rate in Hz
    ]
)
MEDIA_KINDS = ("image", "audio")

_SMALL = 1 << 14  # bytes that one read brings; enough for most headers


@dataclass(frozen=True, slots=True, eq=False)
class ShardContents:
    """What an index holds besides token counts.

    Attributes:
        samples: (n,) `SAMPLE_DTYPE`.
        media: (m,) `MEDIA_DTYPE`, in the order of samples and, inside an interleaved document, of its segments.
        keys: (n,) fixed-width bytes.
        problems: one for each flagged sample.
    """

    samples: np.ndarray
    media: np.ndarray
    keys: np.ndarray
    problems: list[Problem]


def measure_shard(path: Shard, members: Sequence[TarMember]) -> ShardContents:
    """Measures every sample; one with a problem stays, flagged.

    Raises:
        DataError: the shard changed while it was read.
    """
    samples: list[tuple[int, ...]] = []
    media: list[tuple[int, int, int]] = []
    keys: list[bytes] = []
    problems: dict[int, Problem] = {}
    with open_shard(path) as file:
        reader = MemberReader(file, str(path))
        for number, sample in enumerate(group_samples(members)):
            found, interleaved, code = [], False, 0
            try:
                interleaved, found = _measure_sample(sample, reader)
            except SampleError as error:
                code = REASONS.index(error.reason)
                problems[number] = Problem(sample.key, error.reason, error.detail)
            samples.append((sample.start, sample.end - sample.start, len(media), len(found), interleaved, code))
            media += found
            keys.append(sample.key.encode("utf-8", "surrogateescape"))
    contents = ShardContents(
        samples=np.array(samples, SAMPLE_DTYPE),
        media=np.array(media, MEDIA_DTYPE),
        keys=np.array(keys, dtype=np.bytes_) if keys else np.zeros(0, "S1"),
        problems=[],
    )
    _flag_repeated_keys(contents, problems)
    contents.problems.extend(problems[number] for number in sorted(problems))
    return contents


def _measure_sample(sample: TarSample, reader: MemberReader) -> tuple[bool, list[tuple[int, int, int]]]:
    """(whether it is an interleaved document, rows of the media array)."""
    members = dict(sample.members)
    if len(members) < len(sample.members):
        names = [extension for extension, _ in sample.members]
        repeated = next(name for name in names if names.count(name) > 1)
        raise SampleError("duplicate_member", f"two members with extension {repeated!r}")
    segments = None
    if "json" in members:
        segments = parse_segments(parse_json({"json": reader.read(members["json"])}))
    found = []
    for kind, extension, *_ in media_of(members, segments):
        measure = image_size if kind == "image" else audio_size
        try:
            found.append((MEDIA_KINDS.index(kind), *measure(reader.open(members[extension]))))
        except SampleError as error:
            raise SampleError(error.reason, f"{extension}: {error.detail}") from None
    return segments is not None, found


def _flag_repeated_keys(contents: ShardContents, problems: dict[int, Problem]) -> None:
    """A key that comes twice means that the members of a sample do not stand together: none of its parts is whole."""
    _, inverse, counts = np.unique(contents.keys, return_inverse=True, return_counts=True)
    for number in np.flatnonzero(counts[inverse] > 1):
        key = contents.keys[number].decode("utf-8", "surrogateescape")
        detail = f"the key occurs {counts[inverse[number]]} times in the shard; write it with `tar --sort=name`"
        problems[int(number)] = Problem(key, "duplicate_key", detail)
        contents.samples["flag"][number] = REASONS.index("duplicate_key")


class MemberReader:
    """Reads members of an open shard without moving a shared position."""

    def __init__(self, file: ShardFile, where: str) -> None:
        self._file = file
        self._where = where

    def read(self, member: TarMember) -> bytes:
        """All bytes of a member."""
        data = self._file.read_at(member.offset, member.size)
        if len(data) != member.size:
            found = f"member {member.name!r} should have {member.size} bytes, found {len(data)}"
            raise DataError(f"{self._where}: offset {member.offset}: {found}; the shard changed: index it again")
        return data

    def open(self, member: TarMember) -> BinaryIO:
        """A member as a file: a small one is read at once, of a big one only what is asked for."""
        if member.size <= _SMALL:
            return io.BytesIO(self.read(member))
        return cast(BinaryIO, io.BufferedReader(_Span(self._file, member.offset, member.size), _SMALL))


class _Span(io.RawIOBase):
    """A byte range of an open file as a file of its own."""

    def __init__(self, file: ShardFile, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._position))
        data = self._file.read_at(self._start + self._position, wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
