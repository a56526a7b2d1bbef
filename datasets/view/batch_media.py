"""The media of packed batches as a page shows them: pictures and spectrograms as they are fed, sounds as they were recorded.

Each is held once, however many documents show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.datasets.shards.contents import media_of, parse_json, parse_segments
from mmctx.datasets.view.media import clip_uri, png_uri, spectrogram_uri
from mmctx.errors import DataError
from mmctx.pack import PackedBatch


class Slots(NamedTuple):
    """The slots of one picture or clip in one document.

    Attributes:
        kind: ``image`` or ``audio``.
        first: position in the bin.
        count: how many.
        item: number of the picture or clip among those of the bin.
    """

    kind: str
    first: int
    count: int
    item: int


class BatchMedia:
    """Collects what a page embeds. Call `enter` for a bin, then ask for its documents.

    Args:
        data: of the run.

    Attributes:
        uris: name -> {"image": data URI} or {"spectrogram": data URI, "audio": data URI or ""}.
    """

    def __init__(self, data: RunData) -> None:
        self._data = data
        self.uris: dict[str, dict[str, str]] = {}

    def enter(self, number: int, bin: Bin, batch: PackedBatch) -> None:
        """Turns to bin `number` of the step."""
        self._number, self._batch = number, batch
        self._first_rows = {kind: np.cumsum([0, *found.num_tokens]) for kind, found in batch.media.items()}
        self._slots = {kind: found.slots.numpy() for kind, found in batch.media.items()}
        self._rows = {kind: found.rows.numpy() for kind, found in batch.media.items()}
        samples = {(source, sample) for source, sample, *_ in bin.samples}
        keys = {place: self._data.dataset.sources[place[0]][0].locate(place[1])[1] for place in samples}
        times = Counter(keys.values())
        # of samples that share a key, a document does not tell which one it is from
        self._samples: dict[str, tuple[int, int]] = {key: place for place, key in keys.items() if times[key] == 1}

    def slots(self, first: int, end: int) -> list[Slots]:
        """The media of the document at positions `first` to `end`, in reading order."""
        found = []
        for kind, positions in self._slots.items():
            place, stop = np.searchsorted(positions, [first, end]).tolist()
            while place < stop:
                item = int(np.searchsorted(self._first_rows[kind], self._rows[kind][place], side="right")) - 1
                count = self._batch.media[kind].num_tokens[item]
                found.append(Slots(kind, int(positions[place]), count, item))
                place += count
        return sorted(found, key=lambda slots: slots.first)

    def of_document(self, key: str, slots: Sequence[Slots]) -> list[str]:
        """Names in the page of a document's media; embeds those that are new."""
        names = []
        num_clips = sum(s.kind == "audio" for s in slots)
        clips = self._recordings(key) if num_clips else []
        if len(clips) != num_clips:  # a part of a long document, which may be any of its parts
            clips = []
        heard = 0
        for kind, _, _, item in slots:
            name = f"b{self._number}-{kind}-{item}"
            if name not in self.uris:
                media = self._batch.media[kind]
                if kind == "image":
                    self.uris[name] = {"image": png_uri(media.pictures()[item].permute(1, 2, 0).contiguous().numpy())}
                else:
                    start = sum(media.lengths[:item])
                    frames = media.values[start : start + media.lengths[item]].numpy()  # (F, M)
                    recording = clips[heard] if heard < len(clips) else ""
                    self.uris[name] = {"spectrogram": spectrogram_uri(frames), "audio": recording}
            heard += kind == "audio"
            names.append(name)
        return names

    def source_of(self, key: str) -> str:
        """Name of the source that a document's sample came from."""
        if key not in self._samples:
            return ""
        return self._data.dataset.sources[self._samples[key][0]][0].name

    def _recordings(self, key: str) -> list[str]:
        """Data URIs of a sample's clips in reading order; none where they cannot be read any more."""
        if key not in self._samples:
            return []
        source, sample = self._samples[key]
        try:
            members = self._data.dataset.sources[source][0].read(sample).members
            found = media_of(members, parse_segments(parse_json(members)))
        except DataError:
            return []
        return [clip_uri(part.value, members[part.value]) for part in found if part.kind == "audio"]
