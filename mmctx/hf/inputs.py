"""Padded rows, as Transformers hands them over, become one packed batch, in which no row sees another and no padding is computed.

Shapes: B rows, P columns in the cache, L columns of this call, T real tokens of this call, I items of one kind, F frames of the longest
clip, M mel bins, R embeddings of all items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import DataError
from mmctx.layout import DocumentLayout
from mmctx.pack import MediaBatch, PackedBatch

MEDIA_INPUTS = ("pixel_values", "input_features", "input_features_mask")
"""Inputs whose first dimension counts items, not rows."""


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
        inputs: `MEDIA_INPUTS` by name: pixel_values (I, 3, H, W) uint8; input_features (I, F, M); input_features_mask (I, F), None for
            clips of equal length.

    Raises:
        DataError: placeholders and embeddings are not equally many, naming both numbers, or the model lacks the encoder.
    """
    found = {}
    for kind, measure in _MEASURES.items():
        slots = (input_ids == placeholder_ids[kind]).nonzero()[:, 0] if kind in placeholder_ids else input_ids[:0]
        items = measure(encoders.get(kind), inputs)
        if items is None and not len(slots):
            continue
        values, lengths, num_tokens = items or (input_ids[:0], (), ())
        if items is not None and kind not in encoders:
            raise DataError(f"the model has no encoder for {kind} inputs; its config's model.{kind} is null")
        if sum(num_tokens) != len(slots):
            raise DataError(
                f"input_ids hold {len(slots)} {kind} placeholders, but the {len(num_tokens)} {kind} items become {sum(num_tokens)} "
                "embeddings; make both with the model's processor, and cut no text inside media"
            )
        rows = torch.arange(len(slots), device=slots.device)
        found[kind] = MediaBatch(values=values, lengths=lengths, num_tokens=num_tokens, slots=slots, rows=rows)
    return found


def items_by_row(placeholders: Sequence[int], num_tokens: Sequence[int]) -> list[int]:
    """How many items each row shows, from its placeholders and each item's embeddings, in reading order."""
    ends = np.cumsum(num_tokens)
    until = np.searchsorted(ends, np.cumsum(placeholders), side="right")
    return np.diff(until, prepend=0).tolist()


def _pictures(
    encoder: Any, inputs: Mapping[str, Tensor | None]
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]] | None:
    pixels = inputs.get("pixel_values")
    if pixels is None or encoder is None:
        return None if pixels is None else (pixels, (), ())
    return pixels, (1,) * len(pixels), (encoder.geometry.num_tokens,) * len(pixels)


def _clips(encoder: Any, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]] | None:
    features, mask = inputs.get("input_features"), inputs.get("input_features_mask")
    if features is None or encoder is None:
        return None if features is None else (features, (), ())
    lengths = (features.shape[1],) * len(features) if mask is None else tuple(mask.bool().sum(dim=1).tolist())
    frames = torch.cat([clip[:length] for clip, length in zip(features, lengths, strict=True)])
    per_token = encoder.config.frames_per_token
    return frames, lengths, tuple(-(-length // per_token) for length in lengths)


_MEASURES = {"image": _pictures, "audio": _clips}
