"""A fast reader of plain tar archives: headers are sliced as bytes, data is skipped until asked for.

The WebDataset conventions decide what a sample is: consecutive members whose names agree up to the first dot of
the base name.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from mmctx.datasets.remote.storage import Buffer, Shard, map_file
from mmctx.errors import DataError, SampleError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = b"0\x007"  # regular, regular of pre-POSIX archives, contiguous
_PAX = ord("x")  # what the next member's own header has no room for
_TIME_ALONE = tuple(b"%d mtime=" % size for size in range(100))  # how a header of that size with one record begins
_plain_fields = struct.Struct(
    "100s 24x 11s 21x B 188x B"
).unpack_from  # name, size, type, first byte of the name's prefix
_CUT_SHORT = "the file was cut short; copy or write it again"
_NOT_TAR = "a compressed shard must be decompressed, a damaged one copied or written again"


class TarMember(NamedTuple):
    """Where one regular file of an archive lies.

    Attributes:
        name: path inside the archive.
        offset: first byte of the data.
        size: bytes of data, padding not counted.
        header: first byte of the member's headers, those that carry a long name included.
    """

    name: str
    offset: int
    size: int
    header: int


class TarSample(NamedTuple):
    """Consecutive members that share a key.

    Attributes:
        key: directory and base name up to its first dot.
        members: (lower-cased extension, member), in the order of the archive; an extension may occur twice.
    """

    key: str
    members: list[tuple[str, TarMember]]

    @property
    def start(self) -> int:
        """First byte of the first member's headers."""
        return self.members[0][1].header

    @property
    def end(self) -> int:
        """One past the last byte of the last member's data."""
        last = self.members[-1][1]
        return last.offset + last.size


def scan_tar(path: str | Shard) -> Iterator[TarMember]:
    """Yields the regular files of a plain tar in order, reading headers only.

    Raises:
        DataError: the file is missing, empty, compressed or cut short, or a header is damaged.
    """
    with map_file(path) as buffer:
        yield from _walk(buffer, str(path))


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-cased extension) of a member, None for one that belongs to no sample.

    ``a/b.left.PNG`` has key ``a/b`` and extension ``left.png``. As in WebDataset, names without an extension, hidden
    files (``._b.jpg`` of macOS) and what lies under ``__meta__`` belong to no sample.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base or (name.startswith("__") and _is_meta(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _is_meta(name: str) -> bool:
    first = name.partition("/")[0]
    return len(first) >= 4 and first.endswith("__")


def group_samples(members: Iterable[TarMember]) -> Iterator[TarSample]:
    """Groups consecutive members that share a key; members without a key are left out and do not end a sample."""
    sample: TarSample | None = None
    for member in members:
        split = split_name(member.name)
        if split is None:
            continue
        key, extension = split
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key, [])
        sample.members.append((extension, member))
    if sample is not None:
        yield sample


def quick_members(data: bytes, key: bytes) -> dict[str, bytes] | None:
    """`parse_members` for what nearly all shards hold: every member named ``key.extension`` in its own header.

    Reading a sample is mostly this loop, so it looks at nothing that such members do not need.

    Args:
        data: bytes from `TarSample.start` to `TarSample.end`.
        key: of the sample, as the index has it.

    Returns:
        The members, or None for anything out of the ordinary: `parse_members` reads it, or says what is wrong.
    """
    prefix = key + b"."
    named, total, position = len(prefix), len(data), 0
    members: dict[str, bytes] = {}
    while position < total:
        try:
            name, digits, kind, continued = _plain_fields(data, position)
            size = int(digits, 8)
        except (struct.error, ValueError):
            return None
        offset = position + BLOCK
        end = offset + size
        if not offset <= end <= total:
            return None
        position = end + -size % BLOCK
        if kind == _PAX:  # WebDataset's writer puts one before each member, for the fraction of its time stamp
            if size >= len(_TIME_ALONE) or not data.startswith(_TIME_ALONE[size], offset):
                return None
            continue
        if continued or kind not in _REGULAR or not name.startswith(prefix):
            return None
        extension = _extension(name[named:])
        if extension is None or extension in members:
            return None
        members[extension] = data[offset:end]
    return members or None


@lru_cache(maxsize=1024)
def _extension(field: bytes) -> str | None:
    """The extension in what follows the key in a name's field; None where a folder follows. Few are ever seen."""
    extension = _text(field).lower()
    return None if "/" in extension else extension


def parse_members(data: bytes, key: str | None = None, where: str = "sample") -> dict[str, bytes]:
    """The members in one sample's byte range, by lower-cased extension.

    Args:
        data: bytes from `TarSample.start` to `TarSample.end`.
        key: if given, every member must have this key.
        where: names the bytes in errors.

    Raises:
        DataError: the bytes are no whole tar members, or one has another key.
        SampleError: ``duplicate_member``.
    """
    members: dict[str, bytes] = {}
    # Checksums were verified when the shard was indexed; the key tells whether these are still the same bytes.
    for member in _walk(data, where, verify=False):
        split = split_name(member.name)
        if split is None:
            continue
        found, extension = split
        if key is not None and found != key:
            raise DataError(f"{where}: expected members of {key!r}, found {found!r}")
        if extension in members:
            raise SampleError("duplicate_member", f"{where}: two members with extension {extension!r}")
        members[extension] = data[member.offset : member.offset + member.size]
    if key is not None and not members:
        raise DataError(f"{where}: expected members of {key!r}, found none")
    return members


def _walk(buffer: bytes | Buffer, where: str, verify: bool = True) -> Iterator[TarMember]:
    """Yields the regular files in `buffer`; offsets count from its start."""
    position, total = 0, len(buffer)
    first: int | None = None  # where the headers of the coming member start, if extension headers precede it
    extended: dict[str, str] = {}
    while position < total:
        block = buffer[position : position + BLOCK]
        if len(block) < BLOCK:
            found = f"expected a {BLOCK}-byte header, found {len(block)} bytes"
            raise DataError(f"{where}: offset {position}: {found}; {_CUT_SHORT}")
        if block == _ZEROS:
            break
        if verify:
            _verify_checksum(block, where, position)
        kind = block[156:157]
        first = position if first is None else first
        offset = position + BLOCK
        size = _number(block[124:136], where, position)
        if "size" in extended and kind not in b"xgLK":
            size = _decimal(extended["size"], where, position)
        if offset + size > total:
            name = extended.get("path") or _name(block)
            found = f"member {name!r} should have {size} bytes, found {total - offset}"
            raise DataError(f"{where}: offset {offset}: {found}; {_CUT_SHORT}")
        position = offset + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind == b"x":
            records = buffer[offset : offset + size]
            if size >= len(_TIME_ALONE) or not records.startswith(_TIME_ALONE[size]):
                extended |= _pax_records(records, where, offset)
            continue
        if kind == b"L":
            extended["path"] = _text(buffer[offset : offset + size])
            continue
        if kind in b"Kg":  # long link target, global defaults: nothing of ours in them
            continue
        if kind in _REGULAR:
            name = extended.get("path") or _name(block)
            if not name.endswith("/"):  # pre-POSIX archives mark directories so
                yield TarMember(name, offset, size, first)
        first, extended = None, {}
    if extended:
        raise DataError(
            f"{where}: offset {position}: expected a member after its long name, found the end; {_CUT_SHORT}"
        )


def _verify_checksum(block: bytes, where: str, position: int) -> None:
    expected = _number(block[148:156], where, position)
    others = expected - 8 * 0x20  # the field itself counts as spaces
    # The lower half of Adler-32 is one more than the sum of the bytes, modulo 65,521: twenty times as fast as `sum`.
    if zlib.adler32(block) & 0xFFFF != (others + sum(block[148:156]) + 1) % 65521:
        found = sum(block) - sum(block[148:156]) + 8 * 0x20
        raise DataError(f"{where}: offset {position}: header checksum should be {expected}, found {found}; {_NOT_TAR}")


def _number(field: bytes, where: str, position: int) -> int:
    """An octal or, with the top bit set, base-256 header field."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.strip(b" \0") or b"0", 8)
        if number < 0:
            raise ValueError
        return number
    except ValueError:
        raise DataError(
            f"{where}: offset {position}: header number should be octal, found {field!r}; {_NOT_TAR}"
        ) from None


def _decimal(text: str, where: str, position: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(
            f"{where}: offset {position}: PAX size should be a number, found {text!r}; write the shard again"
        )
    return int(text)


def _text(field: bytes) -> str:
    end = field.find(b"\0")
    return (field if end < 0 else field[:end]).decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":  # GNU archives keep other things in the prefix field
        return f"{_text(block[345:500])}/{name}"
    return name


def _pax_records(data: bytes, where: str, offset: int) -> dict[str, str]:
    """``path`` and ``size`` among records of the form ``LENGTH KEY=VALUE\\n``."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position)
        digits = data[position:space]
        length = int(digits) if space > position and digits.isdigit() else 0
        record = data[space + 1 : position + length - 1]
        key, equals, value = record.partition(b"=")
        if not equals or data[position + length - 1 : position + length] != b"\n":
            found = f"expected a PAX record, found {data[position : position + 40]!r}"
            raise DataError(f"{where}: offset {offset + position}: {found}; write the shard again")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        position += length
    return records
