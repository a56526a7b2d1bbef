"""Items of any origin -> shards, cut by count and size, that a second build does not write again.

A source numbers its items 0, 1, 2, ... and can start at any of them. A shard holds the usable ones of a range; its range
is kept in ``build.json``, so that a build walks over whole shards without reading an item, and starts where one is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmctx.datasets.build.ledger import Ledger, shown
from mmctx.datasets.build.members import LeftOut, Rendered
from mmctx.datasets.build.shards import Manifest, fingerprint, write_shard
from mmctx.datasets.build.stream import Item, Part, Stream, add_tally, ordered_map
from mmctx.errors import ConfigError, DataError

Progress = Callable[[str, int, int], None]

HELDOUT_SALT = "mmctx held-out v1"  # never changed and independent of any seed: a test set must not move
RECIPE_VERSION = 1  # raise it when the same source and options begin to give other bytes


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is built.

    Attributes:
        kind: names the build and its shards.
        origin: where the data comes from, to tell one build from another.
        recipe: a JSON value on which items and their rendering depend: options, and sizes and times of the files read.
        items: ``items(split, start)`` yields items `start`, `start` + 1, ... It may leave out those of other splits if it
            does not count them either.
        render: item -> its members; must be picklable, runs in workers. A `SampleError` leaves the item out.
        total: number of items, 0 where it is not known before they are read.
        splits: where the set itself has splits, their names.
        costly: rendering draws or converts, so that several processes are faster than one; copying is not worth them.
        left_out: what was seen to be unusable before there were items.
        facts: of the whole set, for the summary.
    """

    kind: str
    origin: str
    recipe: Any
    items: Callable[[str, int], Iterator[Item]]
    render: Callable[[Item], Rendered]
    total: int = 0
    splits: tuple[str, ...] = ()
    costly: bool = False
    left_out: Sequence[LeftOut] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How shards are cut and made.

    Attributes:
        heldout: share of the samples that goes to ``heldout/`` instead of ``train/``, by a hash of their group.
        samples_per_shard: most samples of a shard.
        shard_mb: most MiB of members of a shard; a larger single sample has one for itself.
        num_workers: processes that read and convert, 1 for none but this one; by default all cores where media must be
            drawn or converted, else 1.
        progress: called as ``progress(split, done, total)``.
    """

    heldout: float = 0.0
    samples_per_shard: int = 1000
    shard_mb: int = 256
    num_workers: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout should be at least 0 and less than 1, found {self.heldout}")
        for name in ("samples_per_shard", "shard_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} should be at least 1, found {getattr(self, name)}")


def is_heldout(group: str, share: float) -> bool:
    """Whether a group is held out: the same answer on every machine, and for a larger share, too."""
    name = f"{HELDOUT_SALT}\0{group}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") < share * 2**64


def listed(items: Sequence[Item]) -> Callable[[str, int], Iterator[Item]]:
    """`Source.items` of a list."""
    return lambda split, start: iter(items[start:])


def mix(items: Iterable[Item]) -> list[Item]:
    """Items in the order of a hash of their keys, so that every shard holds some of everything."""
    return sorted(items, key=lambda i: hashlib.blake2b(i.key.encode("utf-8", "surrogateescape")).digest())


def build_shards(source: Source, out: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``SPLIT/KIND-000000.tar``, ``build.json`` and ``left_out.jsonl`` in `out`; skips shards that are whole.

    The bytes depend on the source and the limits of a shard, never on the number of workers. A source that changed, were it
    in one file, is built anew as a whole: where a shard ends depends on all that stands before it.

    Returns:
        A summary: ``counts`` of samples by split, ``pictures``, ``clips``, ``words``, ``bytes``, ``left_out`` by reason,
        names of files ``written``, ``skipped`` (found whole) and ``deleted`` (of an earlier build), ``seconds``, and
        the facts of the source.

    Raises:
        DataError: nothing can be used, or `out` holds what another build wrote.
    """
    return _Build(source, out, options).run()


class _Build:
    """One build under way."""

    def __init__(self, source: Source, out: Path, options: BuildOptions) -> None:
        self.source, self.out, self.options = source, out, options
        self.recipe = [RECIPE_VERSION, source.kind, source.recipe]
        self.recipe += [options.heldout, options.samples_per_shard, options.shard_mb]
        self.splits = source.splits or (("train", "heldout") if options.heldout else ("train",))
        self.manifest = Manifest(out)
        self.planned: list[str] = []
        self.written: list[str] = []

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        self.manifest.claim(kind=self.source.kind, origin=self.source.origin)
        self.out.mkdir(parents=True, exist_ok=True)
        files = self.manifest.files
        valid = {name for name, f in files.items() if f["recipe"] == self._fingerprint(name, f.get("start", -1))}
        self.ledger = Ledger(self.out, valid)
        workers = self.options.num_workers or ((os.cpu_count() or 1) if self.source.costly else 1)
        with ordered_map(workers) as self.map:
            for split in self.splits:
                self._build_split(split)
        return self._finish(time.perf_counter() - started)

    def _fingerprint(self, name: str, start: int) -> str:
        return fingerprint(self._shard_recipe(name.partition("/")[0], start))

    def _shard_recipe(self, split: str, start: int) -> list[Any]:
        return [self.recipe, split, start]

    def _build_split(self, split: str) -> None:
        start: int | None = 0
        stream: Stream | None = None
        for number in itertools.count():
            if start is None:
                return
            name = f"{split}/{self.source.kind}-{number:06d}.tar"
            if self.manifest.is_whole(name, self._shard_recipe(split, start)):
                self.planned.append(name)
                start, stream = self.manifest.files[name]["end"], None
                continue
            if stream is None:
                stream = Stream(self._rendered(split, start))
            start = self._write(name, split, start, stream)

    def _write(self, name: str, split: str, start: int, stream: Stream) -> int | None:
        """Writes one shard; returns the number of the item that did not fit any more, None at the end."""
        part = Part(stream, self.options.samples_per_shard, self.options.shard_mb << 20)
        count = write_shard(self.out / name, part)
        self.ledger.add(name if count else "", part.left_out)
        if not count:
            (self.out / name).unlink()
            return None
        recipe = self._shard_recipe(split, start)
        self.manifest.record(name, recipe, count, start=start, end=part.end, tally=part.tally)
        self.planned.append(name)
        self.written.append(name)
        return part.end

    def _rendered(self, split: str, start: int) -> Iterator[tuple[int, Rendered]]:
        """(number, rendered) of the items of a split."""
        progress = self.options.progress or (lambda stage, done, total: None)
        numbered = enumerate(self.source.items(split, start), start)
        chosen = ((n, item) for n, item in numbered if self._split_of(item) == split)
        done = start
        for number, rendered in self.map(self.source.render, chosen):
            yield number, rendered
            done = number + 1
            progress(split, done, max(done, self.source.total))
        progress(split, max(done, self.source.total), max(done, self.source.total))

    def _split_of(self, item: Item) -> str:
        if self.source.splits:
            return item.split
        return "heldout" if is_heldout(item.group or item.key, self.options.heldout) else "train"

    def _finish(self, seconds: float) -> dict[str, Any]:
        self.ledger.add("", self.source.left_out)
        files = self.manifest.files
        if not self.planned:
            first = self.ledger.first()
            why = (
                f"left out: {shown(self.ledger.counts())}; first: {first.key}: {first.detail}"
                if first
                else "it is empty"
            )
            raise DataError(f"{self.source.origin}: nothing in it can be used; {why}")
        deleted = self.manifest.drop_all_but(self.planned)
        self.ledger.save(["", *self.planned])
        counts = {s: sum(files[n]["samples"] for n in self.planned if n.startswith(f"{s}/")) for s in self.splits}
        totals: dict[str, int] = {}
        for name in self.planned:
            add_tally(totals, files[name]["tally"])
        left_out, written = self.ledger.counts(), set(self.written)
        self.manifest.save(self.manifest.header | {"counts": counts, **totals, "left_out": left_out})
        return {
            "counts": counts,
            **totals,
            "bytes": sum(files[name]["size"] for name in self.planned),
            **self.source.facts,
            "left_out": left_out,
            "written": self.written,
            "skipped": [name for name in self.planned if name not in written],
            "deleted": deleted,
            "seconds": seconds,
        }
