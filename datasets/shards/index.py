"""Indexing shards: patterns that name them, one shard, or many in a process pool. What an index is: `sidecar.py`."""

from __future__ import annotations

import glob
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from mmctx.datasets.remote.block_cache import BlockCache
from mmctx.datasets.remote.storage import Shard, as_shard, find_remote, is_remote, local_path
from mmctx.datasets.shards.contents import check_texts
from mmctx.datasets.shards.sidecar import ShardIndex, ensure_index
from mmctx.datasets.shards.tokens import TokenCounter
from mmctx.errors import DataError

if TYPE_CHECKING:
    from mmctx.tokenizer import TextTokenizer

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_shards(pattern: str, cache: BlockCache | None = None) -> list[Shard]:
    """The shards that a pattern names: ``x-{0000..0099}.tar``, ``{a,b}/x.tar``, ``x-*.tar`` or a plain path, local or a url.

    Braces and paths keep their order, globs are sorted; a shard named twice comes once.

    Args:
        cache: of remote shards; by default the user's own.

    Raises:
        DataError: the pattern, or a name that its braces make, matches no file, or it is no name that shards can have.
    """
    if is_remote(pattern):
        return [*find_remote(_expand_braces(pattern), cache or BlockCache.at())]
    pattern = local_path(pattern)
    found: dict[Path, None] = {}
    missing = []
    names = list(_expand_braces(pattern))
    for name in names:
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        matches = [match for match in matches if os.path.isfile(match)]
        if not matches:
            missing.append(name)
        found |= dict.fromkeys(map(Path, matches))
    if missing:
        raise DataError(_explain_missing(pattern, missing, len(names)))
    return list(found)


def _expand_braces(pattern: str) -> Iterator[str]:
    """All names that the braces of a pattern make, the last brace varying fastest."""
    pieces = _BRACES.split(pattern)  # literal, brace, literal, ..., literal
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    return map("".join, itertools.product(*choices))


def _choices(brace: str) -> Iterable[str]:
    bounds = _RANGE.fullmatch(brace)
    if bounds is None:
        return brace.split(",")
    first, last = bounds.groups()
    width = len(first) if first.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _explain_missing(pattern: str, missing: Sequence[str], num_names: int) -> str:
    folder = Path(missing[0]).parent
    if not folder.is_dir():
        content = f"folder {folder} does not exist"
    else:
        entries = os.listdir(folder)
        content = (
            f"folder {folder} holds {len(entries)} entries, {sum(e.endswith('.tar') for e in entries)} of them .tar"
        )
    if num_names == 1:
        return f"{pattern}: matches no file; {content}; check the pattern"
    count = f"{len(missing)} of {num_names} names match no file, first {missing[0]}"
    return f"{pattern}: {count}; {content}; check the pattern"


def index_shard(
    path: str | Shard, tokenizer: TextTokenizer | None, texts: Sequence[str], *, force: bool = False
) -> ShardIndex:
    """Indexes a shard, or reuses what an earlier call left: stale parts alone are rebuilt.

    Args:
        path: a plain ``.tar``, or its url.
        tokenizer: counts tokens; None leaves them out.
        texts: the source's texts, such as ``txt`` or ``json:names.zh``.
        force: rebuild everything.

    Raises:
        DataError: the shard is missing, damaged or cut short, or the folder cannot be written.
        ConfigError: `texts` has a malformed entry.
    """
    return index_shards([path], tokenizer, texts, force=force)[0]


def index_shards(
    paths: Sequence[str | Shard],
    tokenizer: TextTokenizer | None,
    texts: Sequence[str],
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    force: bool = False,
) -> list[ShardIndex]:
    """`index_shard` for many shards, in `num_workers` processes (0: in this one).

    Args:
        progress: called with (shards done, shards in all).

    Raises:
        DataError: shards that cannot be indexed, all of them named.
    """
    # Workers count tokens themselves with the Rust tokenizer alone: they start without torch or transformers, and no
    # text travels between processes.
    counter = None if tokenizer is None else TokenCounter.of(tokenizer)
    shards, texts = [as_shard(path) for path in paths], check_texts(texts)
    indexes: dict[int, ShardIndex] = {}
    errors: dict[int, DataError] = {}

    def record(number: int, get: Callable[[], ShardIndex]) -> None:
        try:
            indexes[number] = get()
        except DataError as error:
            errors[number] = error
        if progress is not None:
            progress(len(indexes) + len(errors), len(shards))

    if num_workers < 1 or len(shards) < 2:
        for number, shard in enumerate(shards):
            record(number, lambda shard=shard: ensure_index(shard, counter, texts, force))
    else:
        context = multiprocessing.get_context("spawn")  # forking a process whose tokenizer has threads can hang
        workers = min(num_workers, len(shards))
        with ProcessPoolExecutor(workers, context, _start_worker, (counter, texts, force)) as pool:
            jobs: dict[Future[ShardIndex], int] = {pool.submit(_index, shard): n for n, shard in enumerate(shards)}
            for job in as_completed(jobs):
                record(jobs[job], job.result)
    if errors:
        raise DataError("\n".join(str(errors[number]) for number in sorted(errors)))
    return [indexes[number] for number in range(len(shards))]


_job: tuple[TokenCounter | None, tuple[str, ...], bool] = (None, (), False)  # of this worker process


def _start_worker(counter: TokenCounter | None, texts: tuple[str, ...], force: bool) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool is the parallelism
    _job = (counter, texts, force)


def _index(shard: Shard) -> ShardIndex:
    return ensure_index(shard, *_job)
