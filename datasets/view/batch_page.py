"""A page about the global batch of one step: every bin as a strip, every document as a row, with its media and its targets.

Shapes: T tokens and N documents of one bin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.datasets.view.batch_media import BatchMedia, Slots
from mmctx.datasets.view.render import render
from mmctx.datasets.view.strip import Strip, draw_strip
from mmctx.datasets.view.tokens import Piece, TokenReader, read_document
from mmctx.objectives import DataHalf
from mmctx.pack import IGNORE_INDEX, MODALITIES, PackedBatch, Skip

_HUES = ("#2f9e7a", "#a066c9", "#d9577b", "#a89a2c", "#38a3b8", "#8f6b57", "#4a8fe0", "#e8943a")
_START_CHARACTERS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One document.

    Attributes:
        name: its anchor in the page.
        number: in its bin.
        objective: that made it.
        key: of its sample.
        causal: or in both directions.
        first: position of its first token in the bin.
        num_tokens: of it, media slots included.
        num_read: hidden states that the loss reads.
        start: its first characters.
        pieces: its tokens.
        views: where each embedding is read.
        pair: names of the other documents of its pair, in this bin.
        source: of its sample.
    """

    name: str
    number: int
    objective: str
    key: str
    causal: bool
    first: int
    num_tokens: int
    num_read: int
    start: str
    pieces: list[Piece]
    views: list[str] = field(default_factory=list)
    pair: list[str] = field(default_factory=list)
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BinView:
    """One packed batch.

    Attributes:
        number: of the bin in the step.
        num_tokens: T.
        fill: T over the bin's size.
        num_samples: that it was made from.
        strip: its drawing.
        rows: its documents.
        skips: samples that were drawn and could not be used.
    """

    number: int
    num_tokens: int
    fill: float
    num_samples: int
    strip: Strip
    rows: list[Row]
    skips: tuple[Skip, ...]


def batch_page(
    name: str, step: int, data: RunData, bins: Sequence[Bin], batches: Sequence[PackedBatch], limit: int | None = None
) -> str:
    """A self-contained page of the packed batches of one step.

    Args:
        name: of the run.
        step: that reads them.
        data: of the run; sounds are read anew from its sources, to be played as they were recorded.
        bins: of the step.
        batches: what `data.dataset[bin]` gave for each.
        limit: documents of each bin that are written out as rows; None for all. Strips and totals are always of all.
    """
    media = BatchMedia(data)
    reader = TokenReader(data.tokenizer)
    objectives = sorted({objective for batch in batches for objective in batch.objectives})
    hues = {objective: _HUES[number % len(_HUES)] for number, objective in enumerate(objectives)}
    views = [
        _bin_view(number, bin, batch, data, media, reader, hues, limit)
        for number, (bin, batch) in enumerate(zip(bins, batches, strict=True))
    ]
    return render(
        "batch.html.jinja",
        title=f"{name}, step {step}",
        name=name,
        step=step,
        bins=views,
        hues=hues,
        totals=_totals(batches, data.config.bin_tokens, hues),
        bin_tokens=data.config.bin_tokens,
        media=media.uris,
    )


def _bin_view(
    number: int,
    bin: Bin,
    batch: PackedBatch,
    data: RunData,
    media: BatchMedia,
    reader: TokenReader,
    hues: Mapping[str, str],
    limit: int | None,
) -> BinView:
    starts = np.cumsum([0, *batch.layout.lengths]).tolist()
    media.enter(number, bin, batch)
    slots = [media.slots(first, end) for first, end in pairwise(starts)]
    embeddings = _embeddings(batch, starts)
    partners: dict[int, list[int]] = {}
    for place, embedding in sorted(embeddings.items()):
        partners.setdefault(embedding.pair, []).append(place)
    rows = []
    for place in range(len(slots) if limit is None else min(limit, len(slots))):
        embedding = embeddings.get(place)
        others = [] if embedding is None else partners[embedding.pair]
        names = [f"b{number}d{other}" for other in others if other != place]
        half = data.dataset.objectives[batch.objectives[place]]
        rows.append(_row(number, place, batch, starts, slots[place], media, reader, half, embedding, names))
    return BinView(
        number=number,
        num_tokens=batch.num_tokens,
        fill=batch.num_tokens / data.config.bin_tokens,
        num_samples=batch.num_samples,
        strip=draw_strip(number, batch, starts, slots, _read(batch), data.config.bin_tokens, hues, shown=len(rows)),
        rows=rows,
        skips=(*batch.skips, *batch.left_out),
    )


def _row(
    bin_number: int,
    place: int,
    batch: PackedBatch,
    starts: Sequence[int],
    slots: Sequence[Slots],
    media: BatchMedia,
    reader: TokenReader,
    half: DataHalf,
    embedding: _Embedding | None,
    partners: list[str],
) -> Row:
    first, end = starts[place], starts[place + 1]
    key = batch.keys[place] if batch.keys else ""
    names = media.of_document(key, slots)
    located = {s.first - first: (s.count, s.kind, name) for s, name in zip(slots, names, strict=True)}
    ids, labels = batch.input_ids[first:end].numpy(), batch.labels[first:end].numpy()
    pooled = set() if embedding is None else {position - first for position in embedding.positions}
    pieces = read_document(ids, labels, half, located, pooled, reader)
    start = "".join(f"[{p.text}]" if p.state == "media" else p.text for p in pieces)
    return Row(
        name=f"b{bin_number}d{place}",
        number=place,
        objective=batch.objectives[place],
        key=key,
        causal=place < batch.layout.num_causal,
        first=first,
        num_tokens=end - first,
        num_read=int((labels != IGNORE_INDEX).sum()) + len(pooled),
        start=" ".join(start[: 2 * _START_CHARACTERS].split())[:_START_CHARACTERS],
        pieces=pieces,
        views=[] if embedding is None else [embedding.describe(first)],
        pair=partners,
        source=media.source_of(key),
    )


class _Embedding(NamedTuple):
    view: str
    positions: list[int]
    pair: int

    def describe(self, first: int) -> str:
        """Where in its document, which starts at `first`, it is read."""
        if len(self.positions) == 1:
            return f"{self.view} at position {self.positions[0] - first}"
        return f"{self.view}, the mean over positions {self.positions[0] - first} to {self.positions[-1] - first}"


def _embeddings(batch: PackedBatch, starts: Sequence[int]) -> dict[int, _Embedding]:
    """Document -> its embedding."""
    found = {}
    for name, positions in batch.pooled.items():
        pieces = positions.split(batch.pool_sizes[name])
        for piece, pair in zip(pieces, batch.pairs[name], strict=True):
            place = int(np.searchsorted(starts, int(piece[0]), side="right")) - 1
            found[place] = _Embedding(name.rpartition("/")[2], piece.tolist(), pair)
    return found


def _read(batch: PackedBatch) -> np.ndarray:
    """(T,) bool: hidden states that a loss reads."""
    mask = (batch.labels != IGNORE_INDEX).numpy().copy()
    for positions in batch.pooled.values():
        mask[positions.numpy()] = True
    return mask


def _totals(batches: Sequence[PackedBatch], bin_tokens: int, hues: Mapping[str, str]) -> dict[str, Any]:
    """Numbers of the whole step: tokens, fill, and for each objective and modality."""
    documents, tokens, read, kinds = Counter(), Counter(), Counter(), Counter()
    for batch in batches:
        mask = _read(batch)
        starts = np.cumsum([0, *batch.layout.lengths]).tolist()
        for objective, (first, end) in zip(batch.objectives, pairwise(starts), strict=True):
            documents[objective] += 1
            tokens[objective] += end - first
            read[objective] += int(mask[first:end].sum())
        kinds.update({kind: len(found.slots) for kind, found in batch.media.items()})
    total = sum(batch.num_tokens for batch in batches)
    return {
        "tokens": total,
        "fill": total / (bin_tokens * len(batches)),
        "documents": sum(documents.values()),
        "samples": sum(batch.num_samples for batch in batches),
        "skips": sum(len(batch.skips) + len(batch.left_out) for batch in batches),
        "kinds": {"text": total - sum(kinds.values())} | {kind: kinds[kind] for kind in MODALITIES if kinds[kind]},
        "objectives": [
            {"name": name, "hue": hue, "documents": documents[name], "tokens": tokens[name], "read": read[name]}
            for name, hue in hues.items()
        ],
    }
