"""A source: the samples of many indexed shards under one numbering, their sizes and their bytes."""

from __future__ import annotations

import bisect
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.contents import REASONS
from mmctx.datasets.measure import MEDIA_KINDS
from mmctx.datasets.sidecar import ShardIndex
from mmctx.datasets.tar import parse_members, quick_members
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
    file: FileIO
    samples: np.ndarray
    keys: np.ndarray


class Source:
    """Samples 0 .. num_samples - 1 of `shards`, laid end to end.

    May be pickled and forked: workers open the shards themselves.

    Args:
        name: of the source in the config.
        shards: their indexes, all made with the same tokenizer and texts.
        texts: the texts that the source declares.

    Raises:
        DataError: the shards hold no samples.
    """

    def __init__(self, name: str, shards: Sequence[ShardIndex], texts: Sequence[str]) -> None:
        self.name = name
        self.shards = list(shards)
        self.texts = tuple(texts)
        self._bounds = np.cumsum([0, *(shard.num_samples for shard in self.shards)])  # (shards + 1,)
        self._starts = self._bounds.tolist()  # plain integers: one look-up costs less than in an array
        if not self.num_samples:
            raise DataError(
                f"source {name!r}: its {len(self.shards)} shards hold no samples; check data.sources.{name}.shards"
            )
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
        ids = np.asarray(ids)
        text = np.full((len(ids), max(1, len(self.texts))), -1, np.int64)
        interleaved = np.zeros(len(ids), bool)
        owners, media = [np.zeros(0, np.int64)], []
        for shard, where, local in self._by_shard(ids):
            text[where] = np.maximum(self._tokens(shard)[local], -1)
            samples = shard.samples[local]
            interleaved[where] = samples["interleaved"] != 0
            owners.append(np.repeat(where, samples["num_media"]))
            media.append(shard.media[_rows(samples["media_start"], samples["num_media"])])
        owner = np.concatenate(owners)
        totals = []
        for kind, count in zip(MEDIA_KINDS, (image_tokens, audio_tokens), strict=True):
            total = np.zeros(len(ids), np.int64)
            if len(owner):
                rows = np.concatenate(media)
                mine = rows["kind"] == MEDIA_KINDS.index(kind)
                a, b = rows["a"][mine].astype(np.int64), rows["b"][mine].astype(np.int64)
                np.add.at(total, owner[mine], count(a, b))
            totals.append(total)
        return SampleSizes(text_tokens=text, image_tokens=totals[0], audio_tokens=totals[1], interleaved=interleaved)

    def flags(self, ids: np.ndarray) -> np.ndarray:
        """(n,) uint8 codes of `contents.REASONS`, 0 for samples that can be used."""
        ids = np.asarray(ids)
        flags = np.zeros(len(ids), np.uint8)
        for shard, where, local in self._by_shard(ids):
            found = shard.samples["flag"][local]
            if shard.tokens is not None:  # texts depend on the source, so their problems are kept with the token counts
                of_texts = np.maximum(-1 - shard.tokens[local, 0], 0).astype(np.uint8)
                found = np.where(found, found, of_texts)
            flags[where] = found
        return flags

    @staticmethod
    def flag_reason(code: int) -> str:
        """The word of `contents.REASONS` for a code that `flags` gave."""
        return REASONS[code]

    def locate(self, sample_id: int) -> tuple[Path, str]:
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
        data = os.pread(file.fileno(), size, offset)
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
            try:
                file = FileIO(shard.path)
            except OSError as error:
                raise DataError(
                    f"{shard.path}: cannot be opened ({error.strerror}); restore the shard or remove it from the source"
                ) from None
            self._files[number] = opened = _OpenShard(str(shard.path), file, shard.samples, shard.keys)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return opened


def summarise(shards: Sequence[ShardIndex]) -> dict[str, Any]:
    """Counts over indexed shards: samples, media, hours of sound, text tokens, and problems by reason."""
    reasons: Counter[str] = Counter()
    media: Counter[str] = Counter()
    tokens, hours = 0, 0.0
    for shard in shards:
        rows = shard.media
        reasons.update(problem.reason for problem in shard.problems())
        media.update({kind: int((rows["kind"] == code).sum()) for code, kind in enumerate(MEDIA_KINDS)})
        clips = rows[rows["kind"] == MEDIA_KINDS.index("audio")]
        hours += float((clips["a"] / clips["b"]).sum()) / 3600
        if shard.tokens is not None:
            tokens += int(np.maximum(shard.tokens, 0).sum(dtype=np.int64))
    num_samples = sum(shard.num_samples for shard in shards)
    return {
        "shards": len(shards),
        "samples": num_samples,
        "usable": num_samples - reasons.total(),
        "pictures": media["image"],
        "clips": media["audio"],
        "hours of sound": hours,
        "text tokens": tokens,
        "problems": dict(reasons),
    }


def _rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers starts[i] .. starts[i] + counts[i] - 1 of every i, end to end."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)
