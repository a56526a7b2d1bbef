"""The fingerprint of a batch: changed by all that reaches the model, by nothing else, and the same however ranks share a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmctx.fingerprint import as_signed, bin_fingerprint, combine, show
from mmctx.layout import DocumentLayout
from mmctx.pack import IGNORE_INDEX, Document, MediaBatch, MediaItem, PackedBatch, Skip, pack_documents

PLACEHOLDERS = {"image": 1, "audio": 2}


def make_batch() -> PackedBatch:
    """Two causal documents with a picture and a clip, two views of one sample."""
    picture = MediaItem("image", torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4), 2)
    clip = MediaItem("audio", torch.arange(30.0).reshape(10, 3), 3)

    def document(objective: str, ids: list[int], causal: bool, **more: Any) -> Document:
        array = np.array(ids)
        labels = np.where(array > 4, array, IGNORE_INDEX) if causal else np.full_like(array, IGNORE_INDEX)
        return Document(objective, array, labels, causal, **more)

    return pack_documents(
        [
            document("captioning", [1, 1, 7, 8, 3], True, media=((0, picture),), key="a"),
            document("captioning", [2, 2, 2, 9, 3], True, media=((0, clip),), key="a"),
            document("similarity", [1, 1, 4], False, media=((0, picture),), pooled=2, view="image", pair=5, key="a"),
            document("similarity", [6, 7, 4], False, pooled=2, view="text0", pair=5, key="a"),
        ],
        PLACEHOLDERS,
        num_samples=1,
    )


def touched(tensor: torch.Tensor, place: int = -1) -> torch.Tensor:
    """A copy in which one number is another."""
    changed = tensor.clone()
    changed.view(-1)[place] += 1
    return changed


def with_media(kind: str, change: Callable[[MediaBatch], MediaBatch]) -> Callable[[PackedBatch], PackedBatch]:
    return lambda batch: replace(batch, media={**batch.media, kind: change(batch.media[kind])})


def with_layout(lengths: list[int], num_causal: int) -> Callable[[PackedBatch], PackedBatch]:
    return lambda batch: replace(batch, layout=DocumentLayout.from_lengths(lengths, num_causal))


SEEN: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "input_ids": lambda batch: replace(batch, input_ids=touched(batch.input_ids, 3)),
    "labels": lambda batch: replace(batch, labels=touched(batch.labels, 0)),
    "position_ids": lambda batch: replace(batch, position_ids=touched(batch.position_ids)),
    "layout: a boundary": with_layout([5, 5, 4, 2], 2),
    "layout: one document less": with_layout([10, 3, 3], 2),
    "layout: direction": with_layout([5, 5, 3, 3], 3),
    "objectives": lambda batch: replace(batch, objectives=("captioning", "other", *batch.objectives[2:])),
    "pooled": lambda batch: replace(
        batch, pooled={**batch.pooled, "similarity/image": batch.pooled["similarity/image"] - 1}
    ),
    "pooled: names": lambda batch: replace(
        batch, pooled={name.replace("text0", "text1"): places for name, places in batch.pooled.items()}
    ),
    "pool_sizes": lambda batch: replace(batch, pool_sizes={**batch.pool_sizes, "similarity/text0": (2,)}),
    "pairs": lambda batch: replace(batch, pairs={**batch.pairs, "similarity/text0": (6,)}),
    "pairs: names": lambda batch: replace(
        batch, pairs={name.replace("text0", "text1"): samples for name, samples in batch.pairs.items()}
    ),
    "media: none": lambda batch: replace(batch, media={"image": batch.media["image"]}),
    "media: another kind": lambda batch: replace(
        batch, media={"image": batch.media["image"], "video": batch.media["audio"]}
    ),
    **{
        f"media: {name} of {kind}": with_media(kind, change)
        for kind in PLACEHOLDERS
        for name, change in {
            "values": lambda m: replace(m, values=touched(m.values)),
            "shape of values": lambda m: replace(m, values=m.values.flatten()),
            "lengths": lambda m: replace(m, lengths=(*m.lengths, 1)),
            "num_tokens": lambda m: replace(m, num_tokens=(*m.num_tokens, 1)),
            "slots": lambda m: replace(m, slots=touched(m.slots)),
            "rows": lambda m: replace(m, rows=touched(m.rows)),
            "sizes": lambda m: replace(m, sizes=((4, 4),)),
        }.items()
    },
    "type of values": with_media("audio", lambda m: replace(m, values=m.values.view(torch.int32))),
}
UNSEEN: dict[str, Callable[[PackedBatch], PackedBatch]] = {
    "keys": lambda batch: replace(batch, keys=("b",) * 4),
    "skips": lambda batch: replace(batch, skips=(Skip(source="", shard="", key="", reason="", detail=""),)),
    "left_out": lambda batch: replace(batch, left_out=(Skip(source="", shard="", key="", reason="", detail=""),)),
    "num_samples": lambda batch: replace(batch, num_samples=7),
    "label_positions": lambda batch: replace(batch, label_positions={}),  # they follow from the labels
    "stream_start": lambda batch: replace(batch, stream_start=7),  # it follows from the positions
}


@pytest.mark.parametrize("name", SEEN)
def test_all_that_reaches_the_model_changes_it(name: str) -> None:
    assert bin_fingerprint(0, SEEN[name](make_batch())) != bin_fingerprint(0, make_batch())


def test_no_two_of_these_changes_look_alike() -> None:
    found = {bin_fingerprint(0, change(make_batch())) for change in SEEN.values()}
    assert len(found) == len(SEEN)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_only_people_read_does_not(name: str) -> None:
    assert bin_fingerprint(0, UNSEEN[name](make_batch())) == bin_fingerprint(0, make_batch())


def test_no_field_of_a_batch_is_forgotten_here() -> None:
    tried = {name.partition(":")[0] for name in (*SEEN, *UNSEEN)} - {"type of values"}
    assert tried == {field.name for field in fields(PackedBatch)} - {
        "lent",
        "lane",
    }  # of parts of batches, and of who trains
    of_media = {name.removeprefix("media: ").removesuffix(" of image") for name in SEEN if name.endswith("of image")}
    assert of_media - {"shape of values"} == {field.name for field in fields(MediaBatch)} - {"exchange"}


def test_it_names_the_place_in_the_step_and_outlives_a_process() -> None:
    batch = make_batch()
    assert len({bin_fingerprint(number, batch) for number in range(4)}) == 4
    # Runs on record hold such words: whoever changes what is hashed cuts new runs off from them.
    assert show(bin_fingerprint(0, batch)) == "06a067bff88d28d9"
    assert bin_fingerprint(0, batch.to("cpu")) == bin_fingerprint(0, make_batch())


def test_order_of_entries_in_the_batch_does_not_matter() -> None:
    batch = make_batch()
    turned = {
        name: dict(reversed(list(getattr(batch, name).items())))
        for name in ("pooled", "pairs", "media", "label_positions")
    }
    assert bin_fingerprint(0, replace(batch, **turned)) == bin_fingerprint(0, batch)


words = st.integers(0, 2**64 - 1)


@given(bins=st.lists(words, min_size=1, max_size=12), data=st.data())
def test_a_step_is_named_alike_however_ranks_share_it(bins: list[int], data: st.DataObject) -> None:
    whole = show(combine(bins))
    assert whole == f"{sum(bins) % 2**64:016x}"
    assert show(combine(data.draw(st.permutations(bins)))) == whole
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=len(bins), max_size=len(bins)))
    shares = [[print for print, owner in zip(bins, ranks, strict=True) if owner == rank] for rank in range(4)]
    local = torch.tensor([as_signed(combine(share)) for share in shares])
    assert local.dtype == torch.int64
    assert show(int(local.sum())) == whole


@pytest.mark.parametrize("word", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_signed_words_are_the_same_bits(word: int) -> None:
    assert int(np.uint64(word).astype(np.int64)) == as_signed(word)
    assert show(as_signed(word)) == show(word) == np.uint64(word).tobytes()[::-1].hex()
