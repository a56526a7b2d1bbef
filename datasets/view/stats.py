"""What shards hold, from their indexes alone: `mmctx data stats`. Nothing is decoded, and no table of all samples is ever made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.measure import MEDIA_KINDS
from mmctx.datasets.shards.sidecar import ShardIndex

MediaTokens = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(widths, heights) or (numbers of samples, rates in Hz), each (m,) int64 -> tokens (m,)."""

_NUM_BINS = 24
_IMAGE, _AUDIO = MEDIA_KINDS.index("image"), MEDIA_KINDS.index("audio")


class Distribution:
    """How often each value occurs: exact up to 9,999, to four digits above, so that its size does not grow with the data.

    Args:
        unit: of the values.
        scale: what one counted step is worth in that unit: clips are counted in milliseconds and shown in seconds.
    """

    def __init__(self, unit: str, scale: float = 1.0) -> None:
        self.unit, self.scale = unit, scale
        self.values, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._total, self._least, self._most = 0, 0, 0

    def add(self, values: np.ndarray) -> None:
        """Counts (n,) non-negative integers."""
        if not len(values):
            return
        values = np.asarray(values, np.int64)
        self._least = int(values.min()) if not len(self) else min(self._least, int(values.min()))
        self._most = max(self._most, int(values.max()))
        self._total += int(values.sum())
        found, counts = np.unique(_shortened(values), return_counts=True)
        merged, place = np.unique(np.concatenate([self.values, found]), return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, counts])).astype(np.int64)
        self.values = merged

    def __len__(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest value, in counted steps."""
        return self._least, self._most

    @property
    def total(self) -> float:
        """Sum of all values."""
        return self._total * self.scale

    def quantile(self, share: float) -> float:
        """The smallest value that at least `share` of all do not exceed."""
        place = np.searchsorted(np.cumsum(self.counts), share * len(self))
        return float(self.values[min(place, len(self.values) - 1)]) * self.scale

    def histogram(self, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(edges (b + 1,), counts (b,)) of at most `num_bins` bins from the least to the most."""
        edges = bin_edges(self._least, self._most, num_bins)
        counts = np.histogram(np.clip(self.values, self._least, self._most), edges, weights=self.counts)[0]
        return edges * self.scale, counts.astype(np.int64)

    def summary(self) -> dict[str, float]:
        """The numbers that people compare."""
        return {
            "count": len(self),
            "min": self._least * self.scale,
            "median": self.quantile(0.5),
            "mean": self.total / len(self),
            "p95": self.quantile(0.95),
            "max": self._most * self.scale,
        }


def bin_edges(least: int, most: int, num_bins: int) -> np.ndarray:
    """(b + 1,) edges of at most `num_bins` bins that hold `least` to `most`: of one whole width, so that no bin is empty for want of
    integers, or growing with the values where these span more than a factor of 30.
    """
    if most > 30 * max(least, 1):
        edges = np.unique(np.geomspace(max(least, 1), most + 1, num_bins + 1).round())
        return np.concatenate([[least], edges[1:]])
    width = -(-(most - least + 1) // num_bins)
    return least + width * np.arange(-(-(most - least + 1) // width) + 1, dtype=np.float64)


def _shortened(values: np.ndarray) -> np.ndarray:
    """(n,) to four significant digits, rounded to the nearest."""
    digits = np.floor(np.log10(np.maximum(values, 1))).astype(np.int64) + 1
    step = 10 ** np.maximum(digits - 4, 0)
    return (values + step // 2) // step * step


@dataclass(frozen=True, slots=True)
class SourceStats:
    """What one source holds.

    Attributes:
        name: of the source.
        num_shards: its shards.
        num_samples: in them, unusable ones included.
        num_bytes: of the samples, without the padding around them.
        modalities: samples by what they are made of, such as ``image + text``; only usable ones.
        problems: unusable samples by reason.
        distributions: by what they measure; only those with values.
    """

    name: str
    num_shards: int
    num_samples: int
    num_bytes: int
    modalities: dict[str, int]
    problems: dict[str, int]
    distributions: dict[str, Distribution]

    def total(self, name: str) -> float:
        """Sum of one distribution, 0 where there is none."""
        return self.distributions[name].total if name in self.distributions else 0.0

    @property
    def hours(self) -> float:
        """Hours of sound."""
        return self.total("clip seconds") / 3600

    def to_json(self) -> dict[str, Any]:
        """All numbers, histograms as edges and counts."""
        return {
            "shards": self.num_shards,
            "samples": self.num_samples,
            "usable": self.num_samples - sum(self.problems.values()),
            "bytes": self.num_bytes,
            "hours": self.hours,
            "modalities": self.modalities,
            "problems": self.problems,
            "distributions": {
                name: found.summary() | {"unit": found.unit, "histogram": _histogram_json(found)}
                for name, found in self.distributions.items()
            },
        }


def _histogram_json(found: Distribution) -> dict[str, list[float]]:
    edges, counts = found.histogram(_NUM_BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def source_stats(
    name: str,
    shards: Sequence[ShardIndex],
    texts: Sequence[str],
    image_tokens: MediaTokens | None = None,
    audio_tokens: MediaTokens | None = None,
) -> SourceStats:
    """Counts what indexed shards hold.

    Args:
        name: of the source.
        shards: their indexes.
        texts: the texts that the source declares.
        image_tokens: tokens that the model's encoder makes of pictures; without both of them, samples are not sized.
        audio_tokens: the same of clips.
    """
    collected = _Collected(tuple(texts))
    for shard in shards:
        collected.add(shard, image_tokens, audio_tokens)
    return SourceStats(
        name=name,
        num_shards=len(shards),
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=collected.num_bytes,
        modalities=dict(collected.modalities.most_common()),
        problems=dict(collected.problems.most_common()),
        distributions={name: found for name, found in collected.distributions.items() if len(found)},
    )


class _Collected:
    """Sums over shards, one shard in memory at a time."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = texts
        self.num_bytes = 0
        self.modalities: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.distributions = {
            "picture width": Distribution("pixels"),
            "picture height": Distribution("pixels"),
            "clip seconds": Distribution("s", 1e-3),
            "clip rate": Distribution("Hz"),
            **{f"text tokens, {text}": Distribution("tokens") for text in texts},
            "document text tokens": Distribution("tokens"),
            "document media": Distribution("media"),
            "sample tokens": Distribution("tokens"),
            "sample bytes": Distribution("bytes"),
        }

    def add(self, shard: ShardIndex, image_tokens: MediaTokens | None, audio_tokens: MediaTokens | None) -> None:
        samples, tokens = shard.samples, shard.tokens
        self.num_bytes += int(samples["size"].sum())
        flags = samples["flag"].astype(np.int64)
        if tokens is not None:  # texts depend on the source: their problems stand with the counts
            flags = np.where(flags, flags, np.maximum(-1 - tokens[:, 0], 0))
        self.problems.update({REASONS[code]: int(n) for code, n in enumerate(np.bincount(flags)) if code and n})
        usable = flags == 0
        owner = np.repeat(np.arange(len(samples)), samples["num_media"])
        media = shard.media[usable[owner]] if len(owner) else shard.media
        owner = owner[usable[owner]]
        per_sample = np.zeros((len(MEDIA_KINDS), len(samples)), np.int64)
        np.add.at(per_sample, (media["kind"], owner), 1)
        self._add_media(media)
        self._add_samples(samples, usable, per_sample, tokens)
        if tokens is not None and image_tokens is not None and audio_tokens is not None:
            sizes = np.maximum(tokens, 0).sum(axis=1, dtype=np.int64)
            a, b = media["a"].astype(np.int64), media["b"].astype(np.int64)
            for code, count in ((_IMAGE, image_tokens), (_AUDIO, audio_tokens)):
                mine = media["kind"] == code
                if mine.any():
                    np.add.at(sizes, owner[mine], count(a[mine], b[mine]))
            self.distributions["sample tokens"].add(sizes[usable])

    def _add_media(self, media: np.ndarray) -> None:
        pictures, clips = media[media["kind"] == _IMAGE], media[media["kind"] == _AUDIO]
        self.distributions["picture width"].add(pictures["a"])
        self.distributions["picture height"].add(pictures["b"])
        self.distributions["clip seconds"].add(clips["a"].astype(np.int64) * 1000 // np.maximum(clips["b"], 1))
        self.distributions["clip rate"].add(clips["b"])

    def _add_samples(
        self, samples: np.ndarray, usable: np.ndarray, per_sample: np.ndarray, tokens: np.ndarray | None
    ) -> None:
        documents = usable & (samples["interleaved"] != 0)
        plain = usable & ~documents
        self.distributions["sample bytes"].add(samples["size"][usable])
        self.distributions["document media"].add(samples["num_media"][documents])
        has: dict[str, np.ndarray] = {kind: np.asarray(per_sample[code] > 0) for code, kind in enumerate(MEDIA_KINDS)}
        if tokens is not None:
            has["text"] = np.asarray((tokens > 0).any(axis=1))
            self.distributions["document text tokens"].add(tokens[documents, 0])
            for column, text in enumerate(self.texts):
                found = tokens[plain, column]
                self.distributions[f"text tokens, {text}"].add(found[found >= 0])
        made_of = sum(
            (mask.astype(np.int64) << bit for bit, mask in enumerate(has.values())), np.zeros(len(samples), int)
        )
        for code, count in zip(*np.unique(made_of[plain], return_counts=True), strict=True):
            parts = [name for bit, name in enumerate(has) if code >> bit & 1]
            self.modalities[" + ".join(parts) or "no media"] += int(count)
        if documents.any():
            self.modalities["interleaved"] += int(documents.sum())
