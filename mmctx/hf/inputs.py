"""Padded rows, as Transformers hands them over, become one packed batch, in which no row sees another and no padding is computed.

Shapes: B rows, P columns in the cache, L columns of this call, T real tokens of this call, I items of one kind, F frames of the longest
clip, M mel bins, R embeddings of all items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import DataError
from mmctx.layout import DocumentLayout
from mmctx.pack import MediaBatch, PackedBatch, media_batch

MEDIA_INPUTS = {
    "image": ("pixel_values", "image_sizes"),
    "audio": ("input_features", "input_features_mask", "input_features_tokens"),
}
"""Inputs whose first dimension counts items, not rows, by modality."""


@dataclass(frozen=True)
class Rows:
    """Where the real tokens of padded rows are.

    Attributes:
        past: P.
        mask: (B, P + L) bool, of the columns in the cache, too; None where nothing is padding.
        shape: B, L.
        places: (T,) int64, each token's place in the B times L columns of this call laid end to end.
        lengths: tokens of each row in this call, on the host.
        positions: (T,) int64, in its document.
    """

    past: int
    mask: Tensor | None
    shape: tuple[int, int]
    places: Tensor
    lengths: tuple[int, ...]
    positions: Tensor

    @classmethod
    def of(cls, example: Tensor, past: int, mask: Tensor | None, positions: Tensor | None) -> Rows:
        """Of rows `example` (B, L, ...) behind `past` columns.

        Args:
            example: ids or embeddings.
            past: P.
            mask: (B, P + L), 0 for padding, at whichever end; None for no padding.
            positions: (B or 1, L); None counts the real tokens of each row.

        Raises:
            DataError: mask or positions have another shape, or all is padding.
        """
        (count, columns), device = example.shape[:2], example.device
        wanted = (count, past + columns)
        if mask is not None and tuple(mask.shape) != wanted:
            raise DataError(
                f"attention_mask is {tuple(mask.shape)}, but {count} rows of {columns} tokens behind {past} in the cache take "
                f"{wanted}: one number a token, 0 for padding"
            )
        mask = None if mask is None else mask.to(device=device, dtype=torch.bool)
        if mask is None:
            places, lengths = torch.arange(count * columns, device=device), (columns,) * count
        else:
            now = mask[:, past:]
            places, lengths = now.flatten().nonzero()[:, 0], tuple(now.sum(dim=1).tolist())
        if not len(places):
            raise DataError(
                f"all of the {count} x {columns} tokens are padding: attention_mask has no 1 in their columns"
            )
        if positions is None and mask is not None:
            positions = mask.long().cumsum(dim=1)[:, past:] - 1
        elif positions is None:
            positions = torch.arange(past, past + columns, device=device)[None]
        if positions.ndim != 2 or positions.shape[1] != columns or positions.shape[0] not in (1, count):
            raise DataError(f"position_ids are {tuple(positions.shape)}, the tokens {(count, columns)}")
        positions = positions.to(device).expand(count, columns).reshape(-1).index_select(0, places)
        return cls(past, mask, (count, columns), places, lengths, positions)

    def pack(self, rows: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        flat = rows.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.places)

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zeros at padding."""
        if self.is_full:
            return packed.unflatten(0, self.shape)
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return flat.index_copy(0, self.places, packed).unflatten(0, self.shape)

    @property
    def is_full(self) -> bool:
        """Whether every column of this call is a token."""
        return len(self.places) == self.shape[0] * self.shape[1]

    def latest(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Which packed token was the last one read in each of the kept columns (K,): (B, K) int64, and (B, K) bool, false before a row's
        first."""
        number = torch.full((self.shape[0] * self.shape[1],), -1, device=self.places.device)
        number[self.places] = torch.arange(len(self.places), device=number.device)
        last = number.unflatten(0, self.shape).cummax(dim=1).values.index_select(1, kept)
        return last.clamp(min=0), last >= 0

    def batch(self, input_ids: Tensor, media: Mapping[str, MediaBatch], is_causal: bool) -> PackedBatch:
        """The packed batch of ids (T,): a document for each row that has tokens."""
        lengths = [length for length in self.lengths if length]
        layout = DocumentLayout.from_lengths(lengths, len(lengths) if is_causal else 0, device=input_ids.device)
        return PackedBatch(
            input_ids=input_ids,
            labels=input_ids.new_empty(0),
            position_ids=self.positions,
            layout=layout,
            objectives=("",) * len(lengths),
            media=media,
        )


class Items(NamedTuple):
    """All pictures, or all clips.

    Attributes:
        values: of each, without padding: (3, H, W) uint8, or (F, M) frames.
        num_tokens: embeddings that each becomes.
    """

    values: list[Tensor]
    num_tokens: list[int]


def pictures_of(encoder: Any, inputs: Mapping[str, Tensor | None]) -> Items:
    """Of pixel_values (I, 3, H, W), those of which count that image_sizes (I, 2) says; None for all."""
    pixels, sizes = inputs["pixel_values"], inputs.get("image_sizes")
    assert pixels is not None
    shapes = [tuple(pixels.shape[2:])] * len(pixels) if sizes is None else sizes.tolist()
    unit = encoder.geometry.unit
    values = [picture[:, :height, :width] for picture, (height, width) in zip(pixels, shapes, strict=True)]
    return Items(values, [(height // unit) * (width // unit) for height, width in shapes])


def clips_of(encoder: Any, inputs: Mapping[str, Tensor | None]) -> Items:
    """Of input_features (I, F, M), those frames of which count that input_features_mask (I, F) marks; None for all.

    Raises:
        DataError: the encoder's tokens do not follow from frames, and input_features_tokens (I,) are lacking.
    """
    features, mask, counts = (inputs.get(name) for name in MEDIA_INPUTS["audio"])
    assert features is not None
    lengths = [features.shape[1]] * len(features) if mask is None else mask.bool().sum(dim=1).tolist()
    values = [clip[:length] for clip, length in zip(features, lengths, strict=True)]
    if counts is None and encoder.config.kind != "logmel":
        raise DataError(
            "give input_features_tokens, too, as the processor makes them: how many embeddings each clip becomes"
        )
    per_token = encoder.config.frames_per_token
    return Items(values, [-(-n // per_token) for n in lengths] if counts is None else counts.tolist())


_READERS = {"image": pictures_of, "audio": clips_of}


def media_batches(
    input_ids: Tensor,
    placeholder_ids: Mapping[str, int],
    encoders: Mapping[str, Any],
    inputs: Mapping[str, Tensor | None],
) -> dict[str, MediaBatch]:
    """Pictures and clips, in reading order, for the placeholders of packed ids (T,).

    Args:
        input_ids: ids of all rows, without padding.
        placeholder_ids: modality -> the id that its slots hold.
        encoders: the model's, by modality.
        inputs: `MEDIA_INPUTS` by name, see `pictures_of` and `clips_of`.

    Raises:
        DataError: placeholders and embeddings are not equally many, naming both numbers, or the model lacks the encoder.
    """
    found = {}
    for kind, read in _READERS.items():
        slots = (input_ids == placeholder_ids[kind]).nonzero()[:, 0] if kind in placeholder_ids else input_ids[:0]
        given = inputs.get(MEDIA_INPUTS[kind][0]) is not None
        if not given and not len(slots):
            continue
        if given and kind not in encoders:
            raise DataError(f"the model has no encoder for {kind} inputs; its config's model.{kind} is null")
        items = read(encoders[kind], inputs) if given else Items([], [])
        if sum(items.num_tokens) != len(slots):
            raise DataError(
                f"input_ids hold {len(slots)} {kind} placeholders, but the {len(items.values)} {kind} items become "
                f"{sum(items.num_tokens)} embeddings; make both with the model's processor, and cut no text inside media"
            )
        found[kind] = media_batch(
            kind, items.values, items.num_tokens, slots, torch.arange(len(slots), device=slots.device)
        )
    return found


def items_by_row(placeholders: Sequence[int], num_tokens: Sequence[int]) -> list[int]:
    """How many items each row shows, from its placeholders and each item's embeddings, in reading order."""
    ends = np.cumsum(num_tokens)
    until = np.searchsorted(ends, np.cumsum(placeholders), side="right")
    return np.diff(until, prepend=0).tolist()
