"""The packer: layout, counts, and errors that name the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmctx.errors import DataError
from mmctx.layout import DocumentLayout
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, pack_documents

PLACEHOLDERS = {"image": 90, "audio": 91}


def document(ids: list[int], *, causal: bool = True, media=(), key: str = "k", **more) -> Document:
    array = np.array(ids, dtype=np.int64)
    return Document("o", array, np.full_like(array, IGNORE_INDEX), causal=causal, media=tuple(media), key=key, **more)


def picture(num_tokens: int = 2) -> MediaItem:
    return MediaItem("image", torch.zeros(3, 4, 4, dtype=torch.uint8), num_tokens)


def test_causal_documents_come_first_and_positions_restart() -> None:
    batch = pack_documents(
        [document([1, 2], causal=False), document([3, 4, 5]), document([6], causal=False)], PLACEHOLDERS
    )
    assert batch.input_ids.tolist() == [3, 4, 5, 1, 2, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.layout.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.layout.cu_seqlens.dtype == torch.int32
    assert (batch.layout.num_causal, batch.layout.max_seqlen, batch.layout.num_causal_tokens) == (1, 3, 3)


def test_slots_and_rows_of_shared_and_different_media() -> None:
    shared, other = picture(2), picture(2)
    batch = pack_documents(
        [document([90, 90, 1], media=[(0, shared)]), document([5, 90, 90, 90, 90], media=[(1, other), (3, shared)])],
        PLACEHOLDERS,
    )
    media = batch.media["image"]
    assert len(media.values) == 2
    assert media.slots.tolist() == [0, 1, 4, 5, 6, 7]
    assert media.rows.tolist() == [0, 1, 2, 3, 0, 1]
    assert "audio" not in batch.media


@pytest.mark.parametrize(
    ("ids", "media", "numbers"),
    [
        ([90, 1, 2], [(0, 2)], ["1 image placeholder", "become 2"]),
        ([90, 90, 90], [(0, 2)], ["3 image placeholder", "become 2"]),
        ([90, 90, 91], [(0, 2)], ["1 audio placeholder", "become 0"]),
        ([90, 1, 90], [(0, 2)], ["positions 0..1"]),
    ],
)
def test_placeholders_that_do_not_match_their_media_name_the_sample(ids, media, numbers) -> None:
    items = [(offset, picture(count)) for offset, count in media]
    with pytest.raises(DataError) as error:
        pack_documents([document(ids, media=items, key="sample-17")], PLACEHOLDERS)
    for words in ["sample-17", *numbers]:
        assert words in str(error.value)


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(DataError, match="no documents"):
        pack_documents([], PLACEHOLDERS)


@pytest.mark.parametrize(("lengths", "num_causal", "words"), [([3, 0], 1, "at least 1"), ([3], 2, "num_causal=2")])
def test_impossible_layouts_are_refused(lengths: list[int], num_causal: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DocumentLayout.from_lengths(lengths, num_causal)


def test_views_keep_positions_and_pairs() -> None:
    batch = pack_documents(
        [document([1, 2], pooled=1, view="text0", pair=7), document([3], causal=False, pooled=0, view="image", pair=7)],
        PLACEHOLDERS,
    )
    assert {view: positions.tolist() for view, positions in batch.pooled.items()} == {
        "o/text0": [1],
        "o/image": [2],
    }
    assert batch.pairs == {"o/text0": (7,), "o/image": (7,)}
