"""Reads and decodes everything that shards hold, and says what is wrong with it: `mmctx data check`.

check_defects.py  the words, their levels, the limits
check_media.py    one picture or clip          check_sample.py  one sample
check_shard.py    one shard                    this file        all shards of all sources, in parallel
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmctx.datasets.check.defects import DEFECTS, CheckLimits, Finding, Level, TextRules
from mmctx.datasets.check.shard import ShardCheck, check_shard
from mmctx.datasets.remote.storage import Shard, as_shard
from mmctx.datasets.shards.contents import check_texts
from mmctx.datasets.shards.quarantine import QuarantineEntry
from mmctx.datasets.shards.tar import TarMember, group_samples, scan_tar
from mmctx.datasets.shards.tokens import TokenCounter
from mmctx.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmctx.tokenizer import TextTokenizer

Progress = Callable[[int, int], None]
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found.

    Attributes:
        num_shards: that were read.
        num_samples: in them.
        num_bytes: of the shards.
        counts: findings by defect, gravest first.
        findings: every error, and of each other defect the first 100 of every shard.
        strict: defects that count as errors here, whatever their usual level.
        content_hashes: shard -> hash in its index; shards that cannot be indexed are not among them.
    """

    num_shards: int
    num_samples: int
    num_bytes: int
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    strict: frozenset[str]
    content_hashes: dict[str, str]

    def level(self, defect: str) -> Level:
        """How grave a defect is in this check."""
        return "error" if defect in self.strict else DEFECTS[defect].level

    def total(self, level: Level) -> int:
        """Number of findings of a level."""
        return sum(count for defect, count in self.counts.items() if self.level(defect) == level)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.total("error")

    def quarantine(self) -> list[QuarantineEntry]:
        """One entry for each sample with an error, with the first of its errors.

        Samples of shards that cannot be indexed at all have none: a run refuses those shards as a whole.
        """
        entries: dict[tuple[str, int], QuarantineEntry] = {}
        for finding in self.findings:
            name = self.content_hashes.get(finding.shard)
            if name is not None and finding.number >= 0 and self.level(finding.defect) == "error":
                entry = QuarantineEntry(
                    finding.shard, name, finding.number, finding.key, finding.defect, finding.detail
                )
                entries.setdefault((name, finding.number), entry)
        return [entries[place] for place in sorted(entries)]

    def to_json(self) -> dict[str, Any]:
        """Counts with a few examples of each defect."""
        return {
            "ok": self.ok,
            "shards": self.num_shards,
            "samples": self.num_samples,
            "bytes": self.num_bytes,
            "errors": self.total("error"),
            "warnings": self.total("warning"),
            "infos": self.total("info"),
            "defects": {
                defect: {
                    "level": self.level(defect),
                    "count": count,
                    "meaning": DEFECTS[defect].meaning,
                    "examples": [f._asdict() for f in self.findings if f.defect == defect][:_EXAMPLES],
                }
                for defect, count in self.counts.items()
            },
        }


def check_shards(
    paths: Sequence[str | Shard],
    *,
    texts: Sequence[str] = ("txt",),
    tokenizer: TextTokenizer | None = None,
    context_length: int | None = None,
    limits: CheckLimits | None = None,
    strict: Collection[str] = (),
    num_workers: int = 0,
    progress: Progress | None = None,
) -> CheckResult:
    """Checks the shards of one source.

    Args:
        paths: of the shards; damaged ones are findings, not errors raised.
        texts: where texts stand, such as ``txt`` or ``json:names.zh``.
        tokenizer: finds its special tokens in texts and counts tokens; without one, mmctx's own special tokens count.
        context_length: tokens that a text may have.
        limits: when a size or a level becomes a defect.
        strict: warnings to treat as errors, by name.
        num_workers: processes; 0 or 1 for none besides this one.
        progress: called with (shards done, shards in all).

    Raises:
        ConfigError: `texts` has a malformed entry, or `strict` an unknown word.
        DataError: a worker process died.
    """
    unknown = sorted(set(strict) - set(DEFECTS))
    if unknown:
        raise ConfigError(f"no defect is called {unknown[0]!r}; there are {', '.join(DEFECTS)}")
    rules = _rules(texts, tokenizer, context_length)
    counter = None if tokenizer is None else TokenCounter.of(tokenizer)
    job = (rules, limits or CheckLimits(), counter, frozenset(strict))
    shards = list(dict.fromkeys(map(as_shard, paths)))
    checks: list[ShardCheck | None] = [None] * len(shards)
    for done, (number, check) in enumerate(_run(shards, job, num_workers), start=1):
        checks[number] = check
        if progress is not None:
            progress(done, len(shards))
    found = [check for check in checks if check is not None]
    _note_repeated_keys(shards, found, frozenset(strict))
    return join_results([_result(check, frozenset(strict)) for check in found])


def join_results(results: Sequence[CheckResult]) -> CheckResult:
    """Several sources as one."""
    counts = sum((Counter(result.counts) for result in results), Counter())
    levels: dict[str, Level] = {
        word: ("error" if any(word in r.strict for r in results) else DEFECTS[word].level) for word in counts
    }
    order = sorted(counts, key=lambda word: (("error", "warning", "info").index(levels[word]), -counts[word], word))
    return CheckResult(
        num_shards=sum(result.num_shards for result in results),
        num_samples=sum(result.num_samples for result in results),
        num_bytes=sum(result.num_bytes for result in results),
        counts={word: counts[word] for word in order},
        findings=tuple(finding for result in results for finding in result.findings),
        strict=frozenset().union(*(result.strict for result in results)),
        content_hashes={shard: name for result in results for shard, name in result.content_hashes.items()},
    )


def _rules(texts: Sequence[str], tokenizer: TextTokenizer | None, context_length: int | None) -> TextRules:
    from mmctx.tokenizer import EMBED, MASK, PLACEHOLDERS  # imports torch: here, so that workers do not

    special = (*PLACEHOLDERS.values(), MASK, EMBED)
    if tokenizer is not None:
        added = tokenizer.hf.added_tokens_decoder.values()
        special = tuple(sorted({str(token) for token in added if token.special} | set(special)))
    return TextRules(
        texts=check_texts(texts), context_length=context_length, special_tokens=special, placeholders=dict(PLACEHOLDERS)
    )


_Job = tuple[TextRules, CheckLimits, TokenCounter | None, frozenset[str]]


def _run(paths: Sequence[Shard], job: _Job, num_workers: int) -> Iterator[tuple[int, ShardCheck]]:
    """Yields (number of the path, its check) in any order."""
    workers = min(num_workers, len(paths))
    if workers < 2:
        for number, path in enumerate(paths):
            yield number, check_shard(path, *job)
        return
    context = multiprocessing.get_context("spawn")  # forking a process whose tokenizer has threads can hang
    waiting = {}
    try:
        with ProcessPoolExecutor(workers, context, _start_worker) as pool:
            waiting = {pool.submit(check_shard, path, *job): number for number, path in enumerate(paths)}
            for done in as_completed(list(waiting)):
                result = done.result()
                yield waiting.pop(done), result
    except BrokenProcessPool:
        rest = ", ".join(str(paths[number]) for number in sorted(waiting.values())[:workers])
        raise DataError(
            f"a worker of the check died, of memory or of a decoder's fault, in one of the next shards: {rest}; check them "
            "one at a time with --workers 1"
        ) from None


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is the parallelism


def _note_repeated_keys(shards: Sequence[Shard], checks: Sequence[ShardCheck], strict: frozenset[str]) -> None:
    """Keys that an earlier shard has too, by hashes of 64 bits: of a billion keys, two that differ agree in one check of 30."""
    hashes = np.concatenate([check.key_hashes for check in checks]) if checks else np.zeros(0, np.uint64)
    owners = np.repeat(np.arange(len(checks)), [len(check.key_hashes) for check in checks])
    starts = np.cumsum([0, *(len(check.key_hashes) for check in checks)])
    order = np.argsort(hashes, kind="stable")  # of equal ones, the first shard's comes first
    new = np.concatenate([[True], np.diff(hashes[order]) != 0])[: len(order)]
    first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    elsewhere = owners[order] != owners[first]
    repeated, origins = order[elsewhere], owners[first[elsewhere]]
    for owner in np.unique(owners[repeated]).tolist():
        check, keys = checks[owner], _keys(shards[owner])
        mine = owners[repeated] == owner
        for place, origin in sorted(zip(repeated[mine].tolist(), origins[mine].tolist(), strict=True)):
            number = place - int(starts[owner])
            detail = f"{checks[origin].path} has the key too"
            check.note("repeated_key", detail, number, keys[number], always="repeated_key" in strict)


def _keys(path: Shard) -> list[str]:
    """Keys of the samples up to the end of a shard, or to its first damage."""
    members: list[TarMember] = []
    with contextlib.suppress(DataError):
        for member in scan_tar(path):
            members.append(member)  # one by one: those before a damage stay
    return [sample.key for sample in group_samples(members)]


def _result(check: ShardCheck, strict: frozenset[str]) -> CheckResult:
    hashes = {} if check.content_hash is None else {check.path: check.content_hash}
    counts, findings = dict(check.counts), tuple(check.findings)
    return CheckResult(1, check.num_samples, check.num_bytes, counts, findings, strict, hashes)
