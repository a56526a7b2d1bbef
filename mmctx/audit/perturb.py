"""Batches in which some documents are changed a little: other ids, pixels, frames or labels; shapes and everything else stay.

What is changed lies at both ends of a document or item, beside its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt

import torch
from torch import Tensor

from mmctx.audit.ownership import Holding, Ownership
from mmctx.pack import MediaBatch, PackedBatch


@dataclass(slots=True)
class Perturbed:
    """A changed batch, and where its changes may and must show.

    Attributes:
        batch: with the changes.
        documents: those that were changed, each with the first position that may move.
        must_move: (document, positions of which at least one must move).
        labels_of: documents whose labels were changed: their loss must move.
    """

    batch: PackedBatch
    documents: dict[int, int]
    must_move: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    labels_of: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sweep:
    """One kind of perturbation over a batch.

    Attributes:
        name: `token`, `patch`, `frame` or `label`.
        perturb: (units, number of the pass) -> the batch in which these units are changed.
        documents: of each unit (a document, or a group that shares media), the document that stands for it.
    """

    name: str
    perturb: Callable[[Sequence[int], int], Perturbed]
    documents: tuple[int, ...]

    @property
    def num_units(self) -> int:
        """What can be perturbed."""
        return len(self.documents)


def sweeps(batch: PackedBatch, owned: Ownership, vocab_size: int) -> list[Sweep]:
    """Every kind of perturbation that the batch has something for."""
    text = [(d, positions) for d, positions in enumerate(owned.text()) if positions]
    labelled = [(d, positions) for d, positions in enumerate(owned.labelled) if positions]
    found = [
        Sweep("token", lambda units, _: _tokens(batch, [text[u] for u in units], vocab_size), _first(text)),
        *(_media_sweep(batch, owned, kind) for kind in batch.media),
        Sweep("label", lambda units, _: _labels(batch, [labelled[u] for u in units], vocab_size), _first(labelled)),
    ]
    return [sweep for sweep in found if sweep.num_units]


def _first(pairs: Sequence[tuple[int, Sequence[int]]]) -> tuple[int, ...]:
    return tuple(document for document, _ in pairs)


def _tokens(batch: PackedBatch, units: Sequence[tuple[int, Sequence[int]]], vocab_size: int) -> Perturbed:
    """The first and the last text token of each document become other ids."""
    input_ids = _other_ids(batch.input_ids, [p for _, text in units for p in {text[0], text[-1]}], vocab_size)
    return Perturbed(
        batch=replace(batch, input_ids=input_ids),
        documents={document: text[0] for document, text in units},
        must_move=[(document, (p,)) for document, text in units for p in (text[0], text[-1])],
    )


def _labels(batch: PackedBatch, units: Sequence[tuple[int, Sequence[int]]], vocab_size: int) -> Perturbed:
    """The first and the last label of each document become other ids; no hidden state may move."""
    labels = _other_ids(batch.labels, [p for _, known in units for p in {known[0], known[-1]}], vocab_size)
    never = batch.num_tokens
    return Perturbed(
        batch=replace(batch, labels=labels),
        documents={document: never for document, _ in units},
        labels_of=tuple(document for document, _ in units),
    )


def _other_ids(ids: Tensor, positions: Sequence[int], vocab_size: int) -> Tensor:
    index = torch.tensor(positions, device=ids.device)
    return ids.index_copy(0, index, (ids[index] + 1) % vocab_size)


def _media_sweep(batch: PackedBatch, owned: Ownership, kind: str) -> Sweep:
    """One item of each group of documents that share items: what they share may change them all."""
    holders = owned.holders(kind)
    groups = _groups(list(holders.values()))

    def perturb(units: Sequence[int], number: int) -> Perturbed:
        items = [groups[u][number % len(groups[u])] for u in units]  # another one in each pass
        held = [holding for item in items for holding in holders[item]]
        documents: dict[int, int] = {}
        for holding in held:
            documents[holding.document] = min(holding.first, documents.get(holding.document, holding.first))
        media = {**batch.media, kind: perturb_items(kind, batch.media[kind], items)}
        must_move = [(h.document, tuple(range(h.first, h.first + h.num_tokens))) for h in held]
        return Perturbed(replace(batch, media=media), documents, must_move)

    stand_for = tuple(holders[group[0]][0].document for group in groups)
    return Sweep(MEDIA_PARTS[kind], perturb, stand_for)


def _groups(items: Sequence[Sequence[Holding]]) -> list[list[int]]:
    """Items whose documents are linked by common items, each group in the order of its first document."""
    group_of: dict[int, int] = {}  # document -> group
    groups: dict[int, list[int]] = {}
    for holdings in items:
        touched = {group_of[h.document] for h in holdings if h.document in group_of}
        home = min(touched, default=holdings[0].item)
        groups.setdefault(home, []).append(holdings[0].item)
        for other in touched - {home}:
            groups[home] += groups.pop(other)
        moved = {h.document for h in holdings} | {d for d, group in group_of.items() if group in touched}
        group_of |= dict.fromkeys(moved, home)
    return list(groups.values())


def perturb_items(kind: str, media: MediaBatch, items: Sequence[int]) -> MediaBatch:
    """The first and the last patch of pictures, or frame of clips, changed."""
    return replace(media, values=_CHANGES[kind](media, items))


def _patches(media: MediaBatch, items: Sequence[int]) -> Tensor:
    """Inverts pixels: no value is its own inverse."""
    changed = replace(media, values=media.values.clone())
    before, after = media.pictures(), changed.pictures()
    for item in items:
        height, width = media.picture_sizes[item]
        patch = max(isqrt(height * width // max(media.num_tokens[item], 1)), 1)
        for rows, columns in ((slice(patch), slice(patch)), (slice(height - patch, None), slice(width - patch, None))):
            after[item][:, rows, columns] = 255 - before[item][:, rows, columns]
    return changed.values


def _frames(media: MediaBatch, items: Sequence[int]) -> Tensor:
    """Adds one (a power of ten on the scale of log-mel frames) to two: a constant alone could be normalised away."""
    values = media.values.clone()
    rise = torch.linspace(1, 2, values.shape[-1], device=values.device, dtype=values.dtype)
    for item in items:
        start, length = sum(media.lengths[:item]), media.lengths[item]
        for frame in {start, start + length - 1}:
            values[frame] = media.values[frame] + rise
    return values


_CHANGES: dict[str, Callable[[MediaBatch, Sequence[int]], Tensor]] = {"image": _patches, "audio": _frames}
MEDIA_PARTS = {"image": "patch", "audio": "frame"}
"""What is perturbed of each modality."""
