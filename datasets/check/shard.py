"""Checks one shard: the archive itself, each of its samples, and samples against their neighbours. Imports no torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from mmctx.datasets.check.defects import DEFECTS, CheckLimits, Finding, TextRules
from mmctx.datasets.check.sample import INTERLEAVED, SampleCheck, check_sample
from mmctx.datasets.remote.storage import Buffer, Shard, map_file, open_shard
from mmctx.datasets.shards.measure import MemberReader
from mmctx.datasets.shards.sidecar import content_hash
from mmctx.datasets.shards.tar import BLOCK, TarMember, TarSample, group_samples, scan_tar, split_name
from mmctx.datasets.shards.tokens import TokenCounter
from mmctx.errors import DataError

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_KEPT = 100  # findings of one defect kept from one shard, where they are no errors; all are counted
_CHUNK = 1 << 20


@dataclass(slots=True)
class ShardCheck:
    """What was found in one shard.

    Attributes:
        path: of the shard.
        num_bytes: its size.
        num_samples: samples that were found.
        content_hash: as in its index; None for a shard that cannot be indexed.
        counts: findings by defect.
        findings: all errors, and the first of every other defect.
        key_hashes: (num_samples,) uint64, to find keys that other shards have too.
    """

    path: str
    num_bytes: int = 0
    num_samples: int = 0
    content_hash: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def note(self, defect: str, detail: str, number: int = -1, key: str = "", always: bool = False) -> None:
        """Counts a finding and keeps it, if it is an error (or `always`) or among the first of its kind."""
        self.counts[defect] += 1
        if always or DEFECTS[defect].level == "error" or self.counts[defect] <= _KEPT:
            self.findings.append(Finding(self.path, number, key, defect, detail))


def check_shard(
    path: Shard, rules: TextRules, limits: CheckLimits, counter: TokenCounter | None, strict: frozenset[str]
) -> ShardCheck:
    """Reads and decodes all of a shard.

    Args:
        path: of the shard.
        rules: for texts.
        limits: for media.
        counter: counts tokens; None leaves `over_long` out.
        strict: defects whose every finding is to be kept, as those of errors are.
    """
    check = ShardCheck(str(path))
    try:
        members, whole = _scan(path, check)
        samples = list(group_samples(members))
        check.num_samples = len(samples)
        check.key_hashes = np.array([_key_hash(sample.key) for sample in samples], np.uint64)
        _note_ignored(members, check)
        if whole and not samples:
            check.note("no_samples", f"{len(members)} members, none of which belongs to a sample")
        # of a damaged shard, the last sample may have lost members: nothing is said about it
        checked = samples if whole else samples[:-1]
        _check_samples(path, checked, check, rules, limits, counter, strict)
        if whole:
            check.content_hash = content_hash(path, members)
    except (DataError, OSError) as error:
        check.content_hash = None
        check.note("unreadable", str(error))
    return check


@contextmanager
def open_members(path: Shard) -> Iterator[MemberReader]:
    """Opens a shard to read its members, wherever they lie."""
    with open_shard(path) as file:
        yield MemberReader(file, str(path))


def _scan(path: Shard, check: ShardCheck) -> tuple[list[TarMember], bool]:
    """Members up to the end or to the first damage, and whether there is none."""
    members: list[TarMember] = []
    with map_file(path) as buffer:
        check.num_bytes = len(buffer)
        for magic, name in _MAGIC.items():
            if buffer[: len(magic)] == magic:
                check.note("compressed", f"the shard is packed with {name}; unpack it")
                return [], False
        try:
            for member in scan_tar(path):
                members.append(member)  # one by one: those before a damage stay
        except DataError as error:
            cut = "cut short" in str(error)  # the words of `tar.py`; a test holds both to them
            check.note("truncated" if cut else "bad_header", str(error).removeprefix(f"{path}: "))
            return members, False
        end = members[-1].offset + members[-1].size if members else 0
        _check_end(buffer, -(-end // BLOCK) * BLOCK, check)
    return members, True


def _check_end(buffer: Buffer, position: int, check: ShardCheck) -> None:
    """An archive ends in blocks of zeros, and nothing but zeros follows them. `position` is behind the last file."""
    zeros = bytes(BLOCK)
    while position < len(buffer) and buffer[position : position + BLOCK] != zeros:  # folders and links may come last
        position += BLOCK
    if position >= len(buffer):
        check.note(
            "no_end", f"the file ends at {len(buffer):,} bytes without blocks of zeros; compare it with its origin"
        )
        return
    for start in range(position, len(buffer), _CHUNK):
        chunk = buffer[start : start + _CHUNK]
        if chunk.count(0) != len(chunk):
            rest = len(buffer) - position
            check.note("trailing_data", f"{rest:,} bytes behind the end at {position:,}; write joined tars anew as one")
            return


def _note_ignored(members: Sequence[TarMember], check: ShardCheck) -> None:
    for member in members:
        if split_name(member.name) is None:
            check.note("ignored_member", repr(member.name))


def _check_samples(
    path: Shard,
    samples: Sequence[TarSample],
    check: ShardCheck,
    rules: TextRules,
    limits: CheckLimits,
    counter: TokenCounter | None,
    strict: frozenset[str],
) -> None:
    times = Counter(sample.key for sample in samples)
    results: list[SampleCheck] = []
    with open_members(path) as reader:
        for number, sample in enumerate(samples):
            result = check_sample(sample, reader, rules, limits, counter)
            if times[sample.key] > 1:
                # its parts lack what the other parts have: only what tells nothing about absent members still counts
                detail = f"the key occurs {times[sample.key]} times in the shard; write it with `tar --sort=name`"
                check.note("duplicate_key", detail, number, sample.key)
                result = SampleCheck([d for d in result.defects if DEFECTS[d.defect].level != "error"], None, ())
            seen = set()
            for defect, detail in result.defects:
                if defect not in seen:  # once a sample, however many members have it
                    check.note(defect, detail, number, sample.key, always=defect in strict)
                    seen.add(defect)
            spoilt = any(DEFECTS[defect].level == "error" for defect in seen)
            results.append(result._replace(layout=None, lacks=()) if spoilt else result)
    _compare(samples, results, check, strict)


def _compare(
    samples: Sequence[TarSample], results: Sequence[SampleCheck], check: ShardCheck, strict: frozenset[str]
) -> None:
    """Each sample against what most of its shard have; of two equal halves, the one that comes first is the rule."""
    layouts = Counter(result.layout for result in results if result.layout is not None)
    if not layouts:
        return
    usual = layouts.most_common(1)[0][0]
    lacking = Counter(entry for result in results for entry in result.lacks)
    num_plain = sum(count for layout, count in layouts.items() if INTERLEAVED not in layout)
    for entry in [entry for entry, count in lacking.items() if count == num_plain]:
        check.note("missing_text", f"none of {num_plain} samples has {entry}")
    for number, (sample, result) in enumerate(zip(samples, results, strict=True)):
        if result.layout is None:
            continue
        lacks = [entry for entry in result.lacks if lacking[entry] < num_plain]
        found = list(_differences(result.layout, usual, lacks))
        for defect, detail in found:
            check.note(defect, detail, number, sample.key, always=defect in strict)


def _differences(layout: frozenset[str], usual: frozenset[str], lacks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(defect, detail) of one sample; an absent text or medium is named as such, not as a mixed layout besides."""
    if lacks:
        yield "missing_text", f"{', '.join(lacks)} is absent, neighbours have it"
    if layout == usual:
        return
    absent, extra = usual - layout, layout - usual
    if INTERLEAVED in absent | extra:
        yield "mixed_layout", f"this sample is {_named(layout)}, most are {_named(usual)}"
        return
    no_media = absent & {"image", "audio"}
    if no_media:
        yield "missing_media", f"no {' and no '.join(sorted(no_media))}, most neighbours have one"
    # an absent member that holds a declared text was reported above
    others = (absent - {"image", "audio"} - {entry.partition(":")[0] for entry in lacks}) | extra
    if others:
        yield "mixed_layout", f"members are {_named(layout)}, of most neighbours {_named(usual)}"


def _named(layout: frozenset[str]) -> str:
    return ", ".join(sorted(layout))


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
