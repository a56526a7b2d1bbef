"""A source: the samples of many indexed shards under one numbering, their sizes and their bytes."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.remote.storage import Shard, ShardFile, is_local, open_shard, prefetch
from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.measure import MEDIA_DTYPE, MEDIA_KINDS
from mmctx.datasets.shards.quarantine import Quarantine
from mmctx.datasets.shards.sidecar import ShardIndex
from mmctx.datasets.shards.tar import parse_members, quick_members
from mmctx.datasets.shards.tokens import MEDIA
from mmctx.errors import DataError
from mmctx.sample import SampleSizes

MediaTokens = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(widths, heights) or (numbers of samples, rates in Hz), each (m,) int64 -> tokens (m,)."""

_OPEN_FILES = 64
_STALE = "the index is stale, rebuild it with `mmctx data index --force`"


class RawSample(NamedTuple):
    """The bytes of one sample, not yet decoded.

    Attributes:
        key: the WebDataset key.
        shard: the file it came from.
        members: lower-cased extension -> bytes.
    """

    key: str
    shard: str
    members: dict[str, bytes]


class _OpenShard(NamedTuple):
    """What reading a sample needs of its shard."""

    path: str
    file: ShardFile
    samples: np.ndarray
    keys: np.ndarray


class Source:
    """Samples 0 .. num_samples - 1 of `shards`, laid end to end.

    May be pickled and forked: workers open the shards themselves.

    Args:
        name: of the source in the config.
        shards: their indexes, all made with the same tokenizer and texts.
        texts: the texts that the source declares.
        quarantine: samples that must not be used.

    Raises:
        DataError: the shards hold no samples.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[ShardIndex],
        texts: Sequence[str],
        quarantine: Quarantine | None = None,
    ) -> None:
        self.name = name
        self.shards = list(shards)
        self.texts = tuple(texts)
        self._bounds = np.cumsum([0, *(shard.num_samples for shard in self.shards)])  # (shards + 1,)
        self._starts = self._bounds.tolist()  # plain integers: one look-up costs less than in an array
        if not self.num_samples:
            raise DataError(
                f"source {name!r}: its {len(self.shards)} shards hold no samples; check data.sources.{name}.shards"
            )
        self._quarantine = quarantine or Quarantine(())
        self._files: OrderedDict[int, _OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    @property
    def num_samples(self) -> int:
        """Samples in all shards, those that cannot be used included."""
        return int(self._bounds[-1])

    def sizes(self, ids: np.ndarray, image_tokens: MediaTokens, audio_tokens: MediaTokens) -> SampleSizes:
        """Sizes of samples in model tokens, from the indexes alone.

        Args:
            ids: (n,) sample numbers in any order.
            image_tokens: tokens of pictures.
            audio_tokens: tokens of clips.

        Raises:
            DataError: the shards were indexed without a tokenizer.
        """
        return self.sizes_and_flags(ids, image_tokens, audio_tokens)[0]

    def flags(self, ids: np.ndarray) -> np.ndarray:
        """(n,) uint8 codes of `contents.REASONS`, 0 for samples that can be used."""
        flags = np.zeros(len(ids), np.uint8)
        for shard, where, local in self._by_shard(np.asarray(ids)):
            column = None if shard.tokens is None else shard.tokens[local, 0]
            flags[where] = self._flags(shard, local, shard.samples["flag"][local], column)
        return flags

    def sizes_and_flags(
        self, ids: np.ndarray, image_tokens: MediaTokens, audio_tokens: MediaTokens
    ) -> tuple[SampleSizes, np.ndarray]:
        """What `sizes` and `flags` give, each shard's index opened once."""
        ids = np.asarray(ids)
        text = np.full((len(ids), max(1, len(self.texts))), -1, np.int64)
        interleaved, flags = np.zeros(len(ids), bool), np.zeros(len(ids), np.uint8)
        owners, media = [np.zeros(0, np.int64)], [np.zeros(0, MEDIA_DTYPE)]
        for shard, where, local in self._by_shard(ids):
            tokens = self._tokens(shard)[local]
            text[where] = np.maximum(tokens, -1)
            samples = shard.samples[local]
            interleaved[where] = samples["interleaved"] != 0
            flags[where] = self._flags(shard, local, samples["flag"], tokens[:, 0])
            if samples["num_media"].any():
                owners.append(np.repeat(where, samples["num_media"]))
                media.append(shard.media[_rows(samples["media_start"], samples["num_media"])])
        owner, rows = np.concatenate(owners), np.concatenate(media)
        totals = {}
        for code, (kind, count) in enumerate(zip(MEDIA_KINDS, (image_tokens, audio_tokens), strict=True)):
            totals[kind] = np.zeros(len(ids), np.int64)
            mine = rows["kind"] == code
            a, b = rows["a"][mine].astype(np.int64), rows["b"][mine].astype(np.int64)
            np.add.at(totals[kind], owner[mine], count(a, b))
        num_images = np.bincount(owner[rows["kind"] == MEDIA_KINDS.index("image")], minlength=len(ids))
        sizes = SampleSizes(
            text_tokens=text,
            image_tokens=totals["image"],
            audio_tokens=totals["audio"],
            num_images=np.where(totals["image"] > 0, num_images, 0),
            interleaved=interleaved,
        )
        return sizes, flags

    def _flags(self, shard: ShardIndex, local: np.ndarray, flags: np.ndarray, tokens: np.ndarray | None) -> np.ndarray:
        """Flags of samples `local` of a shard: by its members, by its texts (kept with the token counts), by quarantine."""
        if tokens is not None and (bad := tokens < -1).any():
            flags = np.where(bad & (flags == 0), -1 - tokens, flags)
        held_back = self._quarantine.numbers(shard.content_hash)
        if len(held_back):
            flags = np.where(np.isin(local, held_back), REASONS.index("quarantined"), flags)
        return flags

    def segments(
        self, sample_id: int, image_tokens: MediaTokens, audio_tokens: MediaTokens
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (m,) of an interleaved document's segments and their kinds (m,), -1 for text or the position in `MEDIA_KINDS`."""
        number, local = self._find(sample_id)
        shard = self.shards[number]
        rows = shard.segments
        first, stop = np.searchsorted(rows["sample"], [local, local + 1])
        tokens = rows["tokens"][first:stop].astype(np.int64)
        kinds = np.full(len(tokens), -1)
        places = np.flatnonzero(tokens == MEDIA)
        start, count = int(shard.samples["media_start"][local]), int(shard.samples["num_media"][local])
        media = shard.media[start : start + count]
        for code, measure in enumerate((image_tokens, audio_tokens)):
            mine = media["kind"] == code
            a, b = media["a"][mine].astype(np.int64), media["b"][mine].astype(np.int64)
            tokens[places[mine]], kinds[places[mine]] = measure(a, b), code
        return tokens, kinds

    def problem(self, sample_id: int) -> str:
        """What indexing found wrong with a sample, or that it is quarantined; empty if nothing."""
        number, local = self._find(sample_id)
        shard = self.shards[number]
        if local in self._quarantine.numbers(shard.content_hash):
            return "listed in data.quarantine"
        key = shard.keys[local].decode("utf-8", "surrogateescape")
        return _problems(shard).get(key, "")

    def locate(self, sample_id: int) -> tuple[Shard, str]:
        """(shard, key) of a sample."""
        number, local = self._find(sample_id)
        shard = self.shards[number]
        return shard.path, shard.keys[local].decode("utf-8", "surrogateescape")

    def read(self, sample_id: int) -> RawSample:
        """Reads the bytes of one sample.

        Raises:
            DataError: the shard is missing, cut short, or no longer what was indexed.
            SampleError: ``duplicate_member``.
        """
        number, local = self._find(sample_id)
        path, file, samples, keys = self._open(number)  # held until the read is over: another thread may evict it
        key, (offset, size, *_) = keys[local], samples.item(local)
        data = file.read_at(offset, size)
        name = key.decode("utf-8", "surrogateescape")
        if len(data) != size:
            raise DataError(
                f"{path}: offset {offset}: sample {name!r} should have {size} bytes, found {len(data)}; {_STALE}"
            )
        members = quick_members(data, key)
        if members is None:
            try:
                members = parse_members(data, key=name, where=f"{path} at offset {offset}")
            except DataError as error:
                if type(error) is not DataError:  # a SampleError says what is wrong with the sample itself
                    raise
                raise DataError(f"{error}; {_STALE}") from None
        return RawSample(name, path, members)

    def prefetch(self, ids: Iterable[int]) -> None:
        """Brings what samples need of remote shards near, several requests at once, so that reading them does not wait.

        Raises:
            DataError: a shard changed, or its server cannot be reached.
        """
        ranges: dict[int, list[tuple[int, int]]] = {}
        for sample_id in ids:
            number, local = self._find(sample_id)
            if not is_local(self.shards[number].path):
                offset, size, *_ = self._open(number).samples.item(local)
                ranges.setdefault(number, []).append((offset, size))
        prefetch((self._open(number).file, mine) for number, mine in ranges.items())

    def _find(self, sample_id: int) -> tuple[int, int]:
        """(number of the shard, number of the sample inside it)."""
        if not 0 <= sample_id < self._starts[-1]:
            raise IndexError(f"source {self.name!r}: sample {sample_id} is not among 0..{self.num_samples - 1}")
        number = bisect.bisect_right(self._starts, sample_id) - 1
        return number, int(sample_id) - self._starts[number]

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[ShardIndex, np.ndarray, np.ndarray]]:
        """(shard, positions in `ids`, numbers inside the shard) for each shard that `ids` touch."""
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_samples):
            raise IndexError(f"source {self.name!r}: samples {ids.min()}..{ids.max()} exceed 0..{self.num_samples - 1}")
        numbers = np.searchsorted(self._bounds, ids, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(where):
                number = numbers[where[0]]
                yield self.shards[number], where, ids[where] - self._bounds[number]

    def _tokens(self, shard: ShardIndex) -> np.ndarray:
        tokens = shard.tokens
        if tokens is None:
            raise DataError(
                f"{shard.path}: indexed without a tokenizer, sizes need one; run `mmctx data index` with the config"
            )
        return tokens

    def _open(self, number: int) -> _OpenShard:
        """The first opened are evicted first; they close when their last reader lets go, so threads may share a source."""
        opened = self._files.get(number)
        if opened is None:
            shard = self.shards[number]
            opened = _OpenShard(str(shard.path), open_shard(shard.path), shard.samples, shard.keys)
            self._files[number] = opened
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return opened


@lru_cache(maxsize=_OPEN_FILES)
def _problems(shard: ShardIndex) -> dict[str, str]:
    """Key -> what is wrong."""
    return {problem.key: problem.detail for problem in reversed(shard.problems())}  # of two, the first counts


def _rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers starts[i] .. starts[i] + counts[i] - 1 of every i, end to end."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
