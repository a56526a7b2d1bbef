"""A decoded sample: what the data side hands to the objectives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mmctx.pack import MediaItem

_SOURCE_SHIFT = 48


def make_uid(source_number: int, sample_id: int) -> int:
    """The number of a sample among those of all sources."""
    return source_number << _SOURCE_SHIFT | sample_id


def source_numbers(uids: np.ndarray) -> np.ndarray:
    """(n,) source number of each sample (n,), numbered by `make_uid`."""
    return uids >> _SOURCE_SHIFT


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sample of a source, tokenized and decoded.

    A plain sample has some of `texts`, `image`, `audio`; an interleaved document has `segments` instead.

    Attributes:
        key: the WebDataset key.
        source: name of the source in the config.
        uid: number of the sample, different for every sample of a run; see `make_uid`.
        texts: token ids (L,) int64 of each text the source declares, None where this sample lacks it.
        image: its picture.
        audio: its clip.
        segments: token ids or media, in reading order.
        learned: for each segment, whether causal objectives predict its tokens; None for all of them. Media are never predicted.
        facts: what the json member holds, such as labels; None without one.
    """

    key: str
    source: str
    uid: int
    texts: tuple[np.ndarray | None, ...] = ()
    image: MediaItem | None = None
    audio: MediaItem | None = None
    segments: tuple[np.ndarray | MediaItem, ...] | None = None
    learned: tuple[bool, ...] | None = None
    facts: Any = None

    def fact(self, path: str) -> Any:
        """What stands at a dotted path inside `facts`; None where nothing does."""
        node = self.facts
        for part in path.split("."):
            if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            else:
                node = node.get(part) if isinstance(node, dict) else None
        return node

    @property
    def num_bytes(self) -> int:
        """Memory that its ids, pixels and frames take."""
        parts = [*self.texts, self.image, self.audio, *(self.segments or ())]
        return sum(p.values.nbytes if isinstance(p, MediaItem) else p.nbytes for p in parts if p is not None)


@dataclass(frozen=True, slots=True, eq=False)
class SampleSizes:
    """Sizes of n samples in model tokens, known from the index without decoding anything.

    Attributes:
        text_tokens: (n, number of declared texts) int64, -1 where the sample lacks that text; an interleaved document counts the
            sum of its text segments in column 0.
        image_tokens: (n,) int64, summed over the sample's pictures; 0 where it has none.
        audio_tokens: (n,) int64, summed over the sample's clips; 0 where it has none.
        num_images: (n,) int64 pictures that the image encoder will see.
        interleaved: (n,) bool.
    """

    text_tokens: np.ndarray
    image_tokens: np.ndarray
    audio_tokens: np.ndarray
    num_images: np.ndarray
    interleaved: np.ndarray

    def __len__(self) -> int:
        return len(self.interleaved)

    @classmethod
    def of(cls, sample: Sample) -> SampleSizes:
        """The sizes of one decoded sample, as its index tells them."""
        segments = sample.segments or ()
        texts = [-1 if text is None else len(text) for text in sample.texts]
        if sample.segments is not None:
            texts = [sum(len(part) for part in segments if isinstance(part, np.ndarray))]
        media = [part for part in (sample.image, sample.audio, *segments) if isinstance(part, MediaItem)]
        tokens = {kind: [item.num_tokens for item in media if item.kind == kind] for kind in ("image", "audio")}
        return cls(
            text_tokens=np.array([texts or [-1]], np.int64),
            image_tokens=np.array([sum(tokens["image"])], np.int64),
            audio_tokens=np.array([sum(tokens["audio"])], np.int64),
            num_images=np.array([len(tokens["image"])], np.int64),
            interleaved=np.array([sample.segments is not None]),
        )

    def take(self, rows: np.ndarray) -> SampleSizes:
        """The sizes of some of the samples, in the order of `rows`."""
        return SampleSizes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})
