"""The quarantine list: samples that `mmctx data check` found unusable, one line of JSON each.

    {"shard": path, "content_hash": of its index, "number": in the shard, "key": ..., "reason": ..., "detail": ...}

Entries are matched by content hash and number: a shard that moved keeps its entries, one that was written anew does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.errors import DataError

_FIELDS = {"shard": str, "content_hash": str, "number": int, "key": str, "reason": str, "detail": str}


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """One sample that is not to be read.

    Attributes:
        shard: where the shard lay when it was checked; only for people.
        content_hash: of the shard's index (`ShardIndex.content_hash`).
        number: of the sample in the shard, counted as the index counts, from 0.
        key: of the sample; only for people.
        reason: the defect, one word.
        detail: what was found.
    """

    shard: str
    content_hash: str
    number: int
    key: str
    reason: str
    detail: str


def write_quarantine(path: str | Path, entries: Iterable[QuarantineEntry]) -> int:
    """Writes a list in place of what stands at `path`, as a whole; returns the number of lines.

    Raises:
        DataError: the file cannot be written.
    """
    path = Path(path)
    lines = [json.dumps(asdict(entry)) + "\n" for entry in entries]  # ASCII alone: keys of tars may be any bytes
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text("".join(lines), encoding="ascii")
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
    return len(lines)


class Quarantine:
    """The samples of a list, looked up by shard.

    Args:
        entries: in any order; a sample that is named twice counts once.
    """

    def __init__(self, entries: Iterable[QuarantineEntry]) -> None:
        self.entries = tuple(entries)
        numbers: dict[str, set[int]] = {}
        for entry in self.entries:
            numbers.setdefault(entry.content_hash, set()).add(entry.number)
        self._numbers = {name: np.array(sorted(found), np.int64) for name, found in sorted(numbers.items())}

    @classmethod
    def load(cls, path: str | Path) -> Quarantine:
        """Reads a list.

        Raises:
            DataError: there is no such file, or a line (named by its number) is not an entry.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such quarantine list; write one with `mmctx data check ... --write {path}`"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the quarantine list cannot be read as text ({error}); write it again") from None
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON strings may hold other line separators
        return cls(_parse(line, f"{path}:{number}") for number, line in lines if line.strip())

    def __len__(self) -> int:
        """Samples, each counted once."""
        return sum(map(len, self._numbers.values()))

    def numbers(self, content_hash: str) -> np.ndarray:
        """(n,) int64 sorted numbers of the quarantined samples of one shard."""
        return self._numbers.get(content_hash, np.zeros(0, np.int64))

    @property
    def fingerprint(self) -> str:
        """Names the set of (content hash, number): the order of lines, paths, reasons and details do not matter."""
        digest = hashlib.blake2b(digest_size=8)
        for name, numbers in self._numbers.items():
            digest.update(json.dumps([name, numbers.tolist()]).encode())
        return digest.hexdigest()

    def unmatched(self, content_hashes: Iterable[str]) -> tuple[QuarantineEntry, ...]:
        """Entries of shards that are not among `content_hashes`: changed since the check, or not of this run."""
        known = set(content_hashes)
        return tuple(entry for entry in self.entries if entry.content_hash not in known)


def _parse(line: str, where: str) -> QuarantineEntry:
    remedy = "write the list again with `mmctx data check ... --write`, or remove the line"
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: a line should be a JSON object, found {line[:60]!r} ({error}); {remedy}") from None
    if not isinstance(found, dict) or set(found) != set(_FIELDS):
        names = ", ".join(sorted(found)) if isinstance(found, dict) else type(found).__name__
        raise DataError(f"{where}: an entry should hold {', '.join(_FIELDS)}, found {names}; {remedy}")
    for name, kind in _FIELDS.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise DataError(f"{where}: {name} should be of type {kind.__name__}, found {found[name]!r}; {remedy}")
    if found["number"] < 0:
        raise DataError(f"{where}: number should be 0 or more, found {found['number']}; {remedy}")
    return QuarantineEntry(**found)
