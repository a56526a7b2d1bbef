"""The data contract: documents go in, one `PackedBatch` without padding comes out.

Shapes: T tokens, N documents, P pooled positions, S media slots, I items of one modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import DataError
from mmctx.kv_cache import Cache
from mmctx.layout import DocumentLayout
from mmctx.parallel.exchange import LentRows, RowExchange

IGNORE_INDEX = -100

MODALITIES = ("image", "audio")
"""Kinds of media that an encoder turns into tokens."""

TOKEN_KINDS = ("text", *MODALITIES)


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """One picture or one clip, decoded, not yet encoded.

    The same object may stand in several documents of a batch (captioned in one, embedded in another): it is encoded once.

    Attributes:
        kind: one of `MODALITIES`.
        values: picture (3, H, W) uint8; clip (F, mel bins) float32 log-mel frames.
        num_tokens: how many embeddings the encoder will make of it.
    """

    kind: str
    values: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A run of tokens that attends only to itself.

    Attributes:
        objective: which objective made it and will read it.
        input_ids: (L,) int64, media slots hold the modality's placeholder id.
        labels: (L,) int64, target of THIS position's hidden state, `IGNORE_INDEX` where there is none.
        causal: attends to the past only, or in both directions.
        media: (offset of the first slot, item) in running order.
        pooled: position whose hidden state is the document's embedding, for objectives that embed; the first of them where it is a mean.
        pool_size: positions that the embedding is the mean of.
        view: what an embedding shows, such as `image`, `audio`, `text0`.
        pair: the sample that the view belongs to; views of one sample are positives of each other.
        key: the sample's key, for error messages.
        start: tokens of the document before these, if this is a piece of a stream; None if it is whole.
    """

    objective: str
    input_ids: np.ndarray
    labels: np.ndarray
    causal: bool
    media: tuple[tuple[int, MediaItem], ...] = ()
    pooled: int | None = None
    pool_size: int = 1
    view: str | None = None
    pair: int = -1
    key: str = ""
    start: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaBatch:
    """All different items of one modality, and where their embeddings go.

    Attributes:
        values: pictures (I, 3, H, W) uint8, or where their sizes differ (sum of 3 * H * W,), end to end; clips (sum of frames, mel bins)
            float32, laid end to end.
        lengths: rows of `values` that each item takes (1 or 3 * H * W for a picture, its frames for a clip), on the host.
        num_tokens: embeddings that each item becomes, on the host.
        slots: (S,) int64 positions in the flat sequence.
        rows: (S,) int64 rows of the encoder's output that fill them, in the order of `slots`.
        sizes: height and width of each picture where they differ, on the host.
        exchange: with sequence parallel, how `rows` of this rank's items, of which there may be none, become those of its slots.
    """

    values: Tensor
    lengths: tuple[int, ...]
    num_tokens: tuple[int, ...]
    slots: Tensor
    rows: Tensor
    sizes: tuple[tuple[int, int], ...] = ()
    exchange: RowExchange | None = None

    @property
    def picture_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each picture."""
        height, width = self.values.shape[-2:] if self.values.ndim == 4 else (0, 0)
        return self.sizes or ((height, width),) * len(self.lengths)

    def pictures(self) -> list[Tensor]:
        """(3, H, W) of each picture, views of `values`."""
        if not self.sizes:
            return list(self.values)
        parts = zip(self.values.split(self.lengths), self.sizes, strict=True)
        return [part.view(3, height, width) for part, (height, width) in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A sample that could not be used: one line of `skips.jsonl`."""

    source: str
    shard: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Documents of every objective in one flat sequence: no padding, no batch dimension.

    Attributes:
        input_ids: (T,) int64; media slots hold the modality's placeholder id.
        labels: (T,) int64; target OF THIS position's hidden state, `IGNORE_INDEX` where there is none.
        position_ids: (T,) int64; restart at 0 in each document, count on in a piece of a stream.
        layout: document boundaries (`cu_seqlens`, host lengths, `num_causal`).
        objectives: objective of each document, on the host, in the order of the layout.
        label_positions: per objective, (K,) int64 positions that carry a label: heads are evaluated nowhere else.
        pooled: per `OBJECTIVE/VIEW`, (P,) int64 positions whose states make embeddings.
        pool_sizes: per `OBJECTIVE/VIEW`, how many of these, in running order, each embedding is the mean of, on the host.
        pairs: per `OBJECTIVE/VIEW`, the sample that each embedding belongs to, on the host.
        media: per modality, its different items. A modality that no document uses has no entry.
        keys: the sample's key of each document, on the host.
        skips: samples that the plan named and that could not be used.
        left_out: samples that the plan drew and left out, because the index or their sizes rule them out.
        num_samples: samples (or parts of samples that were split) that the documents were made from.
        stream_start: if the first document is a piece of a stream, its tokens before this piece; None if it is whole.
        lane: what earlier pieces left, on the device; set by who trains.
        lent: with sequence parallel, the hidden states that one rank reads for all of them; `pooled` then counts on behind its tokens.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    layout: DocumentLayout
    objectives: tuple[str, ...]
    label_positions: Mapping[str, Tensor] = field(default_factory=dict)
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    pool_sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pairs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    media: Mapping[str, MediaBatch] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    skips: tuple[Skip, ...] = ()
    left_out: tuple[Skip, ...] = ()
    num_samples: int = 0
    stream_start: int | None = None
    lane: Cache | None = None
    lent: LentRows | None = None

    @property
    def num_tokens(self) -> int:
        """T, of a part the tokens in it."""
        return self.input_ids.shape[0]

    @property
    def tokens_by_modality(self) -> dict[str, int]:
        """How many tokens stand for text and for each kind of media, a picture as often as documents show it."""
        slots = {kind: len(media.slots) for kind, media in self.media.items()}
        return {"text": self.num_tokens - sum(slots.values())} | slots

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """The same batch on another device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from where copies to a GPU do not wait; DataLoader calls this."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            layout=self.layout.with_tensors(change),
            label_positions={name: change(positions) for name, positions in self.label_positions.items()},
            pooled={name: change(positions) for name, positions in self.pooled.items()},
            media={
                kind: replace(m, values=change(m.values), slots=change(m.slots), rows=change(m.rows))
                for kind, m in self.media.items()
            },
            lent=self.lent and replace(self.lent, positions=change(self.lent.positions)),
        )


def pack_documents(
    documents: Sequence[Document],
    placeholder_ids: Mapping[str, int],
    skips: Sequence[Skip] = (),
    num_samples: int = 0,
    left_out: Sequence[Skip] = (),
) -> PackedBatch:
    """Lays documents end to end, causal ones first, and records where everything is.

    Args:
        documents: at least one.
        placeholder_ids: modality -> token id that its slots hold.
        skips: samples that were left out, carried along for the ledger.
        num_samples: samples that the documents were made from.
        left_out: samples that the plan left out, carried along for the ledger.

    Raises:
        DataError: a document's placeholders do not match its media, naming the sample's key and both numbers.
    """
    if not documents:
        raise DataError("cannot pack a batch of no documents: every sample of the bin was skipped, or the bin is empty")
    documents = sorted(documents, key=lambda d: (d.start is None, not d.causal))  # stable
    if any(d.start is not None for d in documents[1:]) or not (documents[0].causal or documents[0].start is None):
        raise DataError("a batch holds at most one piece of a stream, which must be causal")
    for document in documents:
        _check_placeholders(document, placeholder_ids)
    lengths = [len(d.input_ids) for d in documents]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    input_ids = np.concatenate([d.input_ids for d in documents])
    labels = np.concatenate([d.labels for d in documents])
    position_ids = np.concatenate([np.arange(n) + (d.start or 0) for n, d in zip(lengths, documents, strict=True)])
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids).long(),
        labels=torch.from_numpy(labels).long(),
        position_ids=torch.from_numpy(position_ids).long(),
        layout=DocumentLayout.from_lengths(lengths, num_causal=sum(d.causal for d in documents)),
        objectives=tuple(d.objective for d in documents),
        label_positions=_label_positions(documents, starts),
        media={kind: batch for kind in MODALITIES if (batch := _media_batch(kind, documents, starts)) is not None},
        keys=tuple(d.key for d in documents),
        skips=tuple(skips),
        left_out=tuple(left_out),
        num_samples=num_samples,
        stream_start=documents[0].start,
        **_views(documents, starts),
    )


def first_positions(batch: PackedBatch, name: str) -> list[int]:
    """First position of each embedding of `OBJECTIVE/VIEW`; asks the device."""
    starts = np.cumsum([0, *batch.pool_sizes[name]])[:-1]
    return batch.pooled[name][torch.from_numpy(starts).to(batch.pooled[name].device)].tolist()


def _check_placeholders(document: Document, placeholder_ids: Mapping[str, int]) -> None:
    for kind, token_id in placeholder_ids.items():
        found = int((document.input_ids == token_id).sum())
        expected = sum(item.num_tokens for _, item in document.media if item.kind == kind)
        if found != expected:
            raise DataError(
                f"sample {document.key!r} ({document.objective}): {found} {kind} placeholder tokens, but its {kind} items "
                f"become {expected} embeddings; text must not contain the placeholder, and a document must not be cut inside media"
            )
    for offset, item in document.media:
        span = document.input_ids[offset : offset + item.num_tokens]
        if len(span) != item.num_tokens or (span != placeholder_ids[item.kind]).any():
            raise DataError(
                f"sample {document.key!r} ({document.objective}): positions {offset}..{offset + item.num_tokens - 1} should all be "
                f"{item.kind} placeholders, found {span.tolist()}"
            )


def _label_positions(documents: Sequence[Document], starts: np.ndarray) -> dict[str, Tensor]:
    found: dict[str, list[np.ndarray]] = {}
    for document, start in zip(documents, starts, strict=True):
        positions = np.flatnonzero(document.labels != IGNORE_INDEX)
        if len(positions):
            found.setdefault(document.objective, []).append(positions + start)
    return {name: torch.from_numpy(np.concatenate(parts)).long() for name, parts in found.items()}


def _views(documents: Sequence[Document], starts: np.ndarray) -> dict[str, Any]:
    pooled: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, list[int]] = {}
    pairs: dict[str, list[int]] = {}
    for document, start in zip(documents, starts, strict=True):
        if document.pooled is not None and document.view is not None:
            name = f"{document.objective}/{document.view}"
            pooled.setdefault(name, []).append(start + document.pooled + np.arange(document.pool_size))
            sizes.setdefault(name, []).append(document.pool_size)
            pairs.setdefault(name, []).append(document.pair)
    return {
        "pooled": {name: torch.from_numpy(np.concatenate(positions)) for name, positions in pooled.items()},
        "pool_sizes": {name: tuple(found) for name, found in sizes.items()},
        "pairs": {name: tuple(samples) for name, samples in pairs.items()},
    }


def _media_batch(kind: str, documents: Sequence[Document], starts: np.ndarray) -> MediaBatch | None:
    items: dict[int, MediaItem] = {}  # by identity, in order of first use
    first_row: dict[int, int] = {}
    slots, rows, num_rows = [], [], 0
    for document, start in zip(documents, starts, strict=True):
        for offset, item in document.media:
            if item.kind != kind:
                continue
            if id(item) not in items:
                items[id(item)] = item
                first_row[id(item)] = num_rows
                num_rows += item.num_tokens
            slots.append(np.arange(item.num_tokens) + start + offset)
            rows.append(np.arange(item.num_tokens) + first_row[id(item)])
    if not items:
        return None
    parts = [torch.from_numpy(np.concatenate(places)) for places in (slots, rows)]
    return media_batch(kind, [i.values for i in items.values()], [i.num_tokens for i in items.values()], *parts)


def media_batch(
    kind: str, values: Sequence[Tensor], num_tokens: Sequence[int], slots: Tensor, rows: Tensor
) -> MediaBatch:
    """Lays items of one modality end to end: pictures (3, H, W), stacked where they are of one size, or clips (F, mel bins)."""
    sizes = tuple((v.shape[-2], v.shape[-1]) for v in values) if kind == "image" else ()
    if len(set(sizes)) == 1:
        packed, lengths, sizes = torch.stack(list(values)), (1,) * len(values), ()
    else:
        values = [v.reshape(-1) for v in values] if sizes else values
        packed, lengths = torch.cat(list(values)), tuple(map(len, values))
    return MediaBatch(values=packed, lengths=lengths, sizes=sizes, num_tokens=tuple(num_tokens), slots=slots, rows=rows)
