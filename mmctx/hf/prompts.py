"""Where media stand in texts: marks, the parts of chat messages, and rows of one length.

Shapes: B rows, L columns, I items, F frames of the longest clip, M mel bins, S side of a picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmctx.errors import DataError
from mmctx.pack import MODALITIES, MediaItem
from mmctx.tokenizer import PLACEHOLDERS

MARKS = {mark: kind for kind, mark in PLACEHOLDERS.items()}
_MARK = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")


def split_at_marks(text: str) -> list[str]:
    """Texts and marks in turn; nothing empty."""
    return [part for part in _MARK.split(text) if part]


def mark_rows(texts: Sequence[str] | None, given: Mapping[str, Any]) -> tuple[list[str], dict[str, list[Any]]]:
    """Texts that say by marks where their media stand, and the media by modality in reading order.

    Args:
        texts: of each row, with all marks or none; None for media alone.
        given: modality -> one item, or a list of them, or a list for each row; without those that there are not.

    Raises:
        DataError: marks and items are not equally many, or it cannot be told whose items are whose.
    """
    items = {kind: _items(value) for kind, value in given.items()}
    marked = texts is not None and any(mark in text for mark in MARKS for text in texts)
    if texts is None or not marked:
        by_row = {kind: _shared_out(kind, value, items[kind], texts) for kind, value in given.items()}
        if len(sizes := {len(rows) for rows in by_row.values()}) > 1:
            raise DataError(f"media are of {sorted(sizes)} rows: give a text, or as many of one kind as of the other")
        rows = list(texts) if texts is not None else [""] * max(sizes, default=0)
        for kind in (kind for kind in reversed(MODALITIES) if kind in by_row):  # pictures come to stand first
            rows = [PLACEHOLDERS[kind] * count + row for count, row in zip(by_row[kind], rows, strict=True)]
        if not rows:
            raise DataError("there is nothing to read: give a text, pictures or sounds")
        return rows, items
    for kind, mark in PLACEHOLDERS.items():
        marks, found = sum(text.count(mark) for text in texts), len(items.get(kind, ()))
        if marks != found:
            raise DataError(
                f"the texts hold {marks} marks {mark}, but there are {found} {kind} items: one mark stands for one of them"
            )
    return list(texts), items


def _items(value: Any) -> list[Any]:
    """All items, in reading order."""
    if not isinstance(value, list | tuple):
        return [value]
    return [item for part in value for item in (part if isinstance(part, list | tuple) else [part])]


def _shared_out(kind: str, value: Any, items: Sequence[Any], texts: Sequence[str] | None) -> list[int]:
    """How many items each row shows."""
    nested = isinstance(value, list | tuple) and any(isinstance(part, list | tuple) for part in value)
    if nested:
        counts = [len(part) if isinstance(part, list | tuple) else 1 for part in value]
    elif texts is not None and len(texts) == 1:
        counts = [len(items)]
    else:
        counts = [1] * len(items)
    if texts is not None and len(counts) != len(texts):
        raise DataError(
            f"{len(items)} {kind} items for {len(texts)} texts: mark their places by {PLACEHOLDERS[kind]}, or give a list for each text"
        )
    return counts


def media_of_messages(conversations: Sequence[Any]) -> dict[str, list[Any]]:
    """Pictures and sounds of all messages, in reading order; parts that only mark a place bring none."""
    found: dict[str, list[Any]] = {kind: [] for kind in MODALITIES}
    for conversation in conversations:
        for message in conversation:
            for part in message["content"] if not isinstance(message["content"], str) else ():
                kind = "image" if part["type"] == "image_url" else part["type"]
                value = next(
                    (part[key] for key in (part["type"], "path", "url", "base64") if part.get(key) is not None), None
                )
                if kind in found and value is not None:
                    found[kind].append(value["url"] if isinstance(value, Mapping) and "url" in value else value)
    return found


def pad_rows(ids: Sequence[np.ndarray], pad_id: int, side: str) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, L) int64, of rows (L,)."""
    rows = [torch.from_numpy(row) for row in ids]
    padded = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": padded, "attention_mask": mask}


def media_inputs(items: Mapping[str, Sequence[MediaItem]]) -> dict[str, Tensor]:
    """Of what there is: `pixel_values` (I, 3, H, W) uint8, `image_sizes` (I, 2) if they differ; `input_features` (I, F, M) float32,
    `input_features_mask` (I, F), `input_features_tokens` (I,)."""
    found: dict[str, Tensor] = {}
    if pictures := [item.values for item in items.get("image", ())]:
        sizes = torch.tensor([picture.shape[1:] for picture in pictures])  # (I, 2)
        height, width = sizes.amax(dim=0).tolist()
        room = [(0, width - picture.shape[2], 0, height - picture.shape[1]) for picture in pictures]
        found["pixel_values"] = torch.stack([F.pad(picture, r) for picture, r in zip(pictures, room, strict=True)])
        if len(sizes.unique(dim=0)) > 1:
            found["image_sizes"] = sizes
    if clips := items.get("audio"):
        frames = [item.values for item in clips]
        masks = [torch.ones(len(part), dtype=torch.int64) for part in frames]
        found["input_features"] = pad_sequence(frames, batch_first=True)
        found["input_features_mask"] = pad_sequence(masks, batch_first=True)
        found["input_features_tokens"] = torch.tensor([item.num_tokens for item in clips])
    return found
