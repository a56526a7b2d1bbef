"""Long documents: how they are cut, and that what the plan counts is what the loader makes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import book, png, tiny_tree, words, write_shard

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.split import cut, split_sample
from mmctx.datasets.planning.table import SourceTable
from mmctx.datasets.shards.contents import REASONS
from mmctx.errors import SampleError
from mmctx.pack import Document, MediaItem
from mmctx.sample import Sample
from mmctx.train.config import RunConfig

POLICIES = ("drop", "truncate", "split")
FIRST = 5  # of a text's ids: no id is a modality's placeholder


def media_item(num_tokens: int) -> MediaItem:
    return MediaItem("image", torch.zeros(3, 2, 2, dtype=torch.uint8), num_tokens)


@st.composite
def documents(draw, oversized: bool = False) -> tuple[list[int], list[bool], int]:
    """Lengths and kinds of segments, and the room of a part; media fit into a part unless `oversized`."""
    room = draw(st.integers(1, 12))
    is_media = draw(st.lists(st.booleans(), max_size=9))
    largest = [2 * room if media and oversized else room if media else 4 * room for media in is_media]
    return [draw(st.integers(0, most)) for most in largest], is_media, room


def tokens_of(parts) -> list[tuple[int, int]]:
    """(segment, number of the token in it) in the order of the parts."""
    return [(piece.segment, token) for part in parts for piece in part for token in range(piece.start, piece.stop)]


@given(documents())
def test_cut_keeps_every_token_once_and_in_order(document) -> None:
    lengths, is_media, room = document
    parts = cut(lengths, is_media, room)
    assert tokens_of(parts) == [(number, token) for number, length in enumerate(lengths) for token in range(length)]
    assert all(0 < sum(piece.stop - piece.start for piece in part) <= room for part in parts)
    assert all(piece.stop > piece.start for part in parts for piece in part)  # empty segments are in none


@given(documents())
def test_cut_leaves_media_and_texts_that_fit_into_a_part_whole(document) -> None:
    lengths, is_media, room = document
    pieces = Counter(piece.segment for part in cut(lengths, is_media, room) for piece in part)
    assert all(pieces[n] == 1 for n, length in enumerate(lengths) if length > 0 and (is_media[n] or length <= room))


@given(documents())
def test_cut_opens_a_part_only_for_what_does_not_fit_into_the_one_before(document) -> None:
    lengths, is_media, room = document
    parts = cut(lengths, is_media, room)
    for part, following in pairwise(parts):
        used, first = sum(piece.stop - piece.start for piece in part), following[0]
        if first.start:  # a text that is cut fills up the part before
            assert used == room
        elif is_media[first.segment] or lengths[first.segment] <= room:
            assert used + lengths[first.segment] > room
        else:
            assert used == room


@given(documents(oversized=True))
def test_cut_loses_nothing_beside_media_that_have_no_place(document) -> None:
    lengths, is_media, room = document
    parts = cut(lengths, is_media, room)
    assert tokens_of(parts) == [(number, token) for number, length in enumerate(lengths) for token in range(length)]
    for part in parts:
        alone = len(part) == 1 and is_media[part[0].segment]
        assert alone or sum(piece.stop - piece.start for piece in part) <= room


@given(documents(), st.sampled_from(POLICIES))
def test_split_sample_cuts_interleaved_documents_by_policy(document, policy) -> None:
    lengths, is_media, room = document
    segments = tuple(
        media_item(length) if media else np.arange(length) + FIRST
        for length, media in zip(lengths, is_media, strict=True)
        if length
    )
    sample = Sample("k", "s", 1, segments=segments)
    parts = split_sample(sample, policy, room)
    if policy == "drop" or sum(lengths) <= room:
        assert parts == [sample]
        return
    flat = [piece for part in parts for piece in part.segments or ()]
    kept = [piece for piece in flat if isinstance(piece, MediaItem)]
    text = [token for piece in flat if not isinstance(piece, MediaItem) for token in piece.tolist()]
    all_media = [piece for piece in segments if isinstance(piece, MediaItem)]
    all_text = [token for piece in segments if not isinstance(piece, MediaItem) for token in piece.tolist()]
    assert len(parts) == 1 if policy == "truncate" else (kept, text) == (all_media, all_text)
    assert kept == all_media[: len(kept)]  # the very objects: they are encoded once
    assert text == all_text[: len(text)]


@given(
    texts=st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=1, max_size=3),
    image=st.one_of(st.none(), st.integers(1, 10)),
    audio=st.one_of(st.none(), st.integers(1, 10)),
    policy=st.sampled_from(POLICIES),
)
def test_split_sample_cuts_the_texts_of_plain_samples(texts, image, audio, policy) -> None:
    ids = tuple(None if length is None else np.arange(length) + FIRST for length in texts)
    items = [None if length is None else media_item(length) for length in (image, audio)]
    sample = Sample("k", "s", 1, ids, *items)
    parts = split_sample(sample, policy, room=11)
    if policy == "drop":
        assert parts == [sample]
        return
    if policy == "split" and len(texts) == 1 and image is None and audio is None:
        whole = [part.texts[0] if part.segments is None else part.segments[0] for part in parts]
        found = [token for piece in whole if piece is not None for token in piece.tolist()]
        assert found == list(range(FIRST, FIRST + (texts[0] or 0)))
        assert all(piece is None or len(piece) <= 11 for piece in whole)
        return
    (part,) = parts
    assert (part.image, part.audio) == (sample.image, sample.audio)
    for before, after in zip(sample.texts, part.texts, strict=True):
        if before is None or after is None:
            assert before is after
        else:
            assert after.tolist() == before[: 11 - max(image or 0, audio or 0)].tolist()


def album(number: int) -> dict[str, Any]:
    """Pictures in a row; every other album ends with a few words."""
    segments = [{"image": f"{n}.png"} for n in range(9)] + [{"text": words(number, 6)}] * (number % 2)
    pictures = {f"{n}.png": png(n) for n in range(9)}
    return {"__key__": f"album{number}", "json": json.dumps({"segments": segments}).encode()} | pictures


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """Sources of every shape and objective; decoded samples are kept."""
    folder = tmp_path_factory.mktemp("long")
    samples = [{"__key__": f"text{n:03d}", "txt": words(n, 1 + n % 60).encode()} for n in range(60)]
    write_shard(folder / "texts.tar", samples)
    write_shard(folder / "albums.tar", [album(n) for n in range(6)])
    tree = tiny_tree(corpus, folder)
    tree["data"] |= {"cache_mb": 64}
    tree["data"]["sources"]["triples"]["shards"] = str(corpus / "triples-000000.tar")
    triples, books = tree["data"]["sources"]["triples"], tree["data"]["sources"]["books"]
    heldout = triples | {"shards": str(corpus / "heldout-*.tar")}
    texts = {"shards": str(folder / "texts.tar"), "objectives": ["captioning", "masked_lm"]}
    tree["data"]["sources"] |= {
        "texts": texts,
        "texts_masked": texts | {"objectives": ["masked_lm"]},
        "albums": texts | {"shards": str(folder / "albums.tar")},
        "albums_masked": texts | {"shards": str(folder / "albums.tar"), "objectives": ["masked_lm"]},
        "books_masked": books | {"objectives": ["masked_lm"]},
        "triples_alike": heldout | {"objectives": ["similarity"]},
        "triples_masked": heldout | {"objectives": ["masked_lm"]},
    }
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)


def with_policy(data: RunData, policy: str, context_length: int) -> RunData:
    """The same shards, nothing read anew."""
    config = data.config.model_copy(update={"context_length": context_length})
    tables = [
        SourceTable(
            table.source,
            table.config.model_copy(update={"long_documents": policy}),
            table.preprocessors,
            table.objectives,
            table.work,
            config,
        )
        for table in data.dataset.tables
    ]
    return RunData(config, data.tokenizer, data.dataset.with_tables(tables), data.quarantine)


def sizes_of(documents: list[Document], frames_per_token: int) -> list[int]:
    """Tokens, pictures, audio frames and pairs, counted on the documents themselves."""
    items = {id(item): item for document in documents for _, item in document.media}.values()
    frames = [len(item.values) for item in items if item.kind == "audio"]
    return [
        sum(len(document.input_ids) for document in documents),
        sum(item.kind == "image" for item in items),
        sum(-(-count // frames_per_token) * frames_per_token for count in frames),
        len({(document.objective, document.pair) for document in documents if document.view}),
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_planned_is_what_is_made(data: RunData, policy: str) -> None:
    reasons, later_parts = Counter(), set()
    for context_length in (4, 5, 14, 21, 33):
        changed = with_policy(data, policy, context_length)
        for number, table in enumerate(changed.dataset.tables):
            units = table.units(np.arange(table.num_samples))
            # every sample is planned or has a reason, none is lost silently
            assert np.unique(units.owner).tolist() == np.flatnonzero(units.reasons == 0).tolist()
            for sample_id, part, sizes in zip(
                units.owner.tolist(), units.part.tolist(), units.sizes.tolist(), strict=True
            ):
                made = changed.dataset.documents(number, sample_id, 0, part)
                assert made, (table.source.name, context_length, sample_id, part)
                found = sizes_of(made, table.preprocessors.frames_per_token)
                # Masked LM leaves sound out, which the plan counts: on the safe side.
                exact = slice(0, 1) if table.source.name == "triples_masked" else slice(None)
                assert found[exact] == sizes[exact], (table.source.name, context_length, sample_id, part)
                assert all(a <= b for a, b in zip(found, sizes, strict=True))
                assert max(len(document.input_ids) for document in made) <= context_length
                if part:
                    later_parts.add(table.source.name)
            reasons.update((table.source.name, REASONS[code]) for code in units.reasons[units.reasons > 0].tolist())
    assert {reason for name, reason in reasons if name == "triples"} == {"over_long"}  # they lack nothing
    assert {reason for name, reason in reasons if name == "albums_masked"} >= {"missing_member"}
    splittable = {"texts", "texts_masked", "books", "books_masked", "albums", "albums_masked"}
    assert later_parts == (splittable if policy == "split" else set())


@pytest.mark.parametrize("context_length", [14, 21, 33])
def test_all_parts_of_a_split_sample_are_planned(data: RunData, context_length: int) -> None:
    changed = with_policy(data, "split", context_length)
    for number, table in enumerate(changed.dataset.tables):
        if table.source.name not in ("texts", "books", "albums"):
            continue
        units = table.units(np.arange(table.num_samples))
        parts = Counter(units.owner.tolist())
        for sample_id, count in parts.items():
            sample = changed.dataset.sample(number, sample_id)
            segments = sample.segments if sample.segments is not None else sample.texts
            text = [token for piece in segments if isinstance(piece, np.ndarray) for token in piece.tolist()]
            found = []
            for part in range(count):
                (document,) = [
                    d for d in changed.dataset.documents(number, sample_id, 0, part) if d.objective == "captioning"
                ]
                ids = document.input_ids[:-1]
                found += ids[~np.isin(ids, list(changed.tokenizer.placeholder_ids.values()))].tolist()
            assert found == text
            if count > 1:
                with pytest.raises(SampleError, match=f"promises part {count}, the sample makes {count}"):
                    changed.dataset.documents(number, sample_id, 0, count)


def test_a_text_is_cut_only_where_a_document_would_be_too_long(data: RunData) -> None:
    """A text that fits beside nothing, but is embedded alone, stays as it is."""
    number = [table.source.name for table in data.dataset.tables].index("triples_alike")
    whole = with_policy(data, "drop", 128).dataset.tables[number]
    ids = np.arange(whole.num_samples)
    longest = max(len(d.input_ids) for i in ids.tolist() for d in data.dataset.documents(number, i, 0))
    changed = with_policy(data, "truncate", longest).dataset
    assert (changed.tables[number].units(ids).sizes == whole.units(ids).sizes).all()
    for sample_id in ids.tolist():
        pairs = zip(changed.documents(number, sample_id, 0), data.dataset.documents(number, sample_id, 0), strict=True)
        assert all((a.input_ids == b.input_ids).all() for a, b in pairs)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("missing", [{}, {"image": None}, {"image": None, "audio": None}])
def test_segments_that_take_no_place_shift_nothing(
    tree: dict[str, Any], tmp_path: Path, policy: str, missing: dict[str, Any]
) -> None:
    """Blank texts, and media that the model has no encoder for, stand in the index and not in the decoded sample."""
    books = [book(number) for number in range(10)]
    for number, sample in enumerate(books):
        segments = json.loads(sample["json"])["segments"]
        blank = [{"text": ""}, {"text": words(number, 12)}, {"text": ""}]
        sample["json"] = json.dumps({"segments": blank[number % 2 :] + segments + blank}).encode()
    write_shard(tmp_path / "books.tar", books)
    tree["model"] |= missing
    tree["data"]["sources"] = {
        "s": {"shards": str(tmp_path / "books.tar"), "objectives": ["captioning"], "long_documents": policy}
    }
    tree["data"] |= {"context_length": 17, "cache_mb": 8}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    table = data.tables["s"]
    units = table.units(np.arange(10))
    assert len(units.owner) > 10 if policy == "split" else len(units.owner) <= 10
    for sample_id, part, sizes in zip(units.owner.tolist(), units.part.tolist(), units.sizes.tolist(), strict=True):
        made = data.dataset.documents(0, sample_id, 0, part)
        assert sizes_of(made, table.preprocessors.frames_per_token) == sizes
        assert len(made[0].input_ids) <= 17


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_parts_know_which_texts_are_learned(policy) -> None:
    segments = (np.arange(FIRST, FIRST + 7), media_item(2), np.arange(FIRST, FIRST + 4))
    sample = Sample(key="k", source="s", uid=0, segments=segments, learned=(False, True, True))
    parts = split_sample(sample, policy, 5)
    assert [part.learned for part in parts] == [(False,), (False, True), (True,)][: 1 if policy == "truncate" else 3]
    assert all(len(part.learned or ()) == len(part.segments or ()) for part in parts)
