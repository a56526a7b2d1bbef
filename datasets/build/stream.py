"""Items through workers in order, and the cut of what comes out into shards."""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmctx.datasets.build.members import LeftOut, Members, Rendered
from mmctx.datasets.shards.contents import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Segment, parse_segments
from mmctx.errors import SampleError

_AHEAD = 8  # items a worker may be ahead of the shard: enough to keep it busy, few enough to hold in memory


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be: all that is known before its media are read.

    Attributes:
        key: of the sample in the shard.
        payload: what is needed to render it; a `LeftOut` if that is known not to go.
        group: items of one group are held out together; the key by default.
        split: where the set itself says which split the item belongs to.
    """

    key: str
    payload: Any = None
    group: str = ""
    split: str = ""


Render = Callable[[Item], Rendered]
Numbered = tuple[int, Item]
OrderedMap = Callable[[Render, Iterable[Numbered]], Iterator[tuple[int, Rendered]]]


@contextmanager
def ordered_map(num_workers: int) -> Iterator[OrderedMap]:
    """Renders numbered items in `num_workers` processes (1: in this one), results in order and never far ahead."""
    if num_workers <= 1:
        yield lambda render, items: (_render(render, item) for item in items)
        return
    # Spawned, because the parent may hold threads of torch. The pool starts with its first item: a build that skips
    # everything waits for nothing.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:

        def rendered(render: Render, items: Iterable[Numbered]) -> Iterator[tuple[int, Rendered]]:
            waiting: deque[Future[tuple[int, Rendered]]] = deque()
            for item in items:
                waiting.append(pool.submit(_render, render, item))
                if len(waiting) >= num_workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield rendered
        finally:
            pool.shutdown(cancel_futures=True)


def _render(render: Render, numbered: Numbered) -> tuple[int, Rendered]:
    number, item = numbered
    if isinstance(item.payload, LeftOut):
        return number, Rendered(None, (item.payload,))
    try:
        return number, render(item)
    except SampleError as error:
        return number, Rendered(None, (LeftOut(item.key, error.reason, error.detail),))


class Stream:
    """Rendered items, one of which may be put back."""

    def __init__(self, rendered: Iterator[tuple[int, Rendered]]) -> None:
        self._rendered = rendered
        self._back: tuple[int, Rendered] | None = None

    def put_back(self, entry: tuple[int, Rendered]) -> None:
        self._back = entry

    def __iter__(self) -> Iterator[tuple[int, Rendered]]:
        while True:
            if self._back is not None:
                entry, self._back = self._back, None
                yield entry
                continue
            entry = next(self._rendered, None)
            if entry is None:
                return
            yield entry


class Part:
    """The samples of one shard: as many of a stream as fit.

    Attributes:
        left_out: what was left out on the way.
        end: number of the item that did not fit, None if the stream ended first.
        tally: numbers of ``pictures``, ``clips`` and ``words``.
    """

    def __init__(self, stream: Stream, max_samples: int, max_bytes: int) -> None:
        self._stream, self._max_samples, self._max_bytes = stream, max_samples, max_bytes
        self.left_out: list[LeftOut] = []
        self.end: int | None = None
        self.tally: dict[str, int] = {"pictures": 0, "clips": 0, "words": 0}

    def __iter__(self) -> Iterator[Members]:
        keys: set[str] = set()
        size = 0
        for number, rendered in self._stream:
            members = rendered.members
            if members is None:
                self.left_out += rendered.left_out
                continue
            key = str(members["__key__"])
            bytes_more = sum(len(value) for value in members.values())
            if keys and (len(keys) == self._max_samples or size + bytes_more > self._max_bytes):
                self._stream.put_back((number, rendered))
                self.end = number
                return
            self.left_out += rendered.left_out
            if key in keys:  # members of two samples would run into one
                self.left_out.append(LeftOut(key, "duplicate_key", "an earlier sample of the shard has the same key"))
                continue
            keys.add(key)
            size += bytes_more
            add_tally(self.tally, count_contents(members))
            yield members


def count_contents(members: Members) -> dict[str, int]:
    """Numbers of ``pictures``, ``clips`` and, by spaces, ``words`` in ``txt`` or in the segments of a document."""
    kinds = [name.rpartition(".")[2] for name in members]
    texts = []
    if "txt" in members:
        texts = [bytes(members["txt"]).decode("utf-8", "replace")]  # type: ignore[arg-type]
    elif "json" in members:
        texts = [segment.value for segment in _segments(members["json"]) if segment.kind == "text"]
    return {
        "pictures": sum(kind in IMAGE_EXTENSIONS for kind in kinds),
        "clips": sum(kind in AUDIO_EXTENSIONS for kind in kinds),
        "words": sum(len(text.split()) for text in texts),
    }


def _segments(data: str | bytes) -> list[Segment]:
    try:
        return parse_segments(json.loads(data)) or []
    except SampleError:  # a sample that was taken over as it is; the index will say what is wrong with it
        return []


def add_tally(totals: dict[str, int], counts: Mapping[str, int]) -> None:
    """Adds `counts` to `totals`."""
    for name, count in counts.items():
        totals[name] = totals.get(name, 0) + count
