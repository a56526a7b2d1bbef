"""Recall documents: exact lengths, facts that can be found where they are said to be, nothing that gives an answer away."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import shards_of

from mmctx.datasets.build.recall import build_recall
from mmctx.datasets.build.recall_document import RecallDocument, write_document
from mmctx.datasets.build.recall_words import CODE, FILLER, KEYS, KINDS, NAMES, NUM_PICTURES, VALUES, draw_picture
from mmctx.datasets.build.shards import read_shard
from mmctx.datasets.decode import decode_image
from mmctx.errors import ConfigError
from mmctx.tokenizer import TextTokenizer

CASES = [(64, 1), (127, 1), (512, 1), (512, 4), (2048, 1)]


def make(length: int, picture_tokens: int = 1, seed: int = 0) -> RecallDocument:
    return write_document(length, np.random.default_rng(seed), picture_tokens)


def laid_out(document: RecallDocument, picture_tokens: int) -> list[str | int]:
    """One entry a token: the word, or the number of the picture."""
    found: list[str | int] = []
    for piece in document.pieces:
        found += [piece.word] if piece.picture < 0 else [piece.picture] * picture_tokens
    return found


@pytest.mark.parametrize(("length", "picture_tokens"), CASES)
def test_length_is_exact_with_the_end_of_text(length: int, picture_tokens: int) -> None:
    for seed in range(3):
        assert len(laid_out(make(length, picture_tokens, seed), picture_tokens)) == length - 1


@pytest.mark.parametrize(("length", "picture_tokens"), CASES)
def test_each_asked_fact_stands_twice_and_no_more(length: int, picture_tokens: int) -> None:
    document = make(length, picture_tokens)
    tokens = laid_out(document, picture_tokens)
    assert {question.kind for question in document.questions} == set(KINDS)
    for question in document.questions:
        stated, asked = tokens[slice(*question.fact)], tokens[slice(*question.ask)]
        assert stated == asked
        assert stated[-1] == question.answer
        key = stated[-2]
        mentions = [place for place, token in enumerate(tokens) if token == key]
        size = picture_tokens if question.kind == "picture" else 1
        assert len(mentions) == 2 * size  # nothing in between gives the answer again
    first = document.questions[0].ask[0]
    assert first + sum(q.ask[1] - q.ask[0] for q in document.questions) == length - 1  # all of them at the end


def test_only_values_that_were_stated_before_are_learned() -> None:
    known: dict[Any, str] = {}
    document = make(2048)
    for key, value in zip(document.pieces, document.pieces[1:], strict=False):
        assert value.learned == (value.word in VALUES and (key.word or key.picture) in known)
        if value.word in VALUES:
            assert known.setdefault(key.word or key.picture, value.word) == value.word  # a key keeps its value
    assert sum(piece.learned for piece in document.pieces) > 2048 // 8  # enough to learn from


def test_vocabularies_are_disjoint_and_pictures_differ() -> None:
    words = [*KEYS, *NAMES, *VALUES, *FILLER, *CODE]
    assert len(set(words)) == len(words) == 128 + 128 + 32 + 26 + 3
    pictures = [draw_picture(number) for number in range(NUM_PICTURES)]
    assert len(set(pictures)) == NUM_PICTURES == 96
    pixels = np.stack([decode_image(png).numpy() for png in pictures]).reshape(NUM_PICTURES, -1).astype(int)
    closest = min(np.abs(a - b).mean() for n, a in enumerate(pixels) for b in pixels[:n])
    assert closest > 5  # in steps of 255, over all pixels


def test_distances_reach_over_the_whole_document() -> None:
    """Stream facts come again at distances spread evenly in log: each doubling has its share; depths of asked facts are spread evenly."""
    last: dict[Any, int] = {}
    distances = []
    document = make(8192)
    for place, piece in enumerate(document.pieces):
        if piece.learned:
            distances.append(place - last[document.pieces[place - 1]])
        if piece.word in VALUES:
            last[document.pieces[place - 1]] = place
    octaves = np.bincount(np.log2(distances).astype(int), minlength=13)
    assert (octaves[1:10] > 0.03 * len(distances)).all()
    assert octaves[10:].sum() > 0.05 * len(
        distances
    )  # asked facts, most of them: the keys of the stream do not reach so far
    depths = [q.fact[0] / q.ask[0] for q in document.questions]
    assert (np.histogram(depths, 4, (0, 1))[0] >= len(depths) // 6).all()


def test_a_document_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="20 tokens holds no question"):
        make(20)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recall")
    build_recall(out, lengths=(64, 256), tokens=1024, heldout_tokens=512)
    return out


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    return [sample for shard in shards_of(out, split) for sample in read_shard(shard)]


def test_the_tokenizer_makes_one_token_of_each_word(built: Path) -> None:
    tokenizer = TextTokenizer(built / "tokenizer")
    words = [*KEYS, *NAMES, *VALUES, *FILLER, *CODE]
    ids = tokenizer.encode(" ".join(words))
    assert len(ids) == len(words) == len(set(ids.tolist()))
    assert tokenizer.decode(ids) == " ".join(words)
    for split, length, count in (("train-64", 64, 16), ("heldout-256", 256, 2)):
        found = samples(built, split)
        assert len(found) == count
        for sample in found:
            segments = json.loads(sample["json"])["segments"]
            texts = [segment["text"] for segment in segments if "text" in segment]
            total = sum(map(len, tokenizer.encode_many(texts))) + sum("image" in segment for segment in segments)
            assert total == length - 1


def test_a_build_is_deterministic_and_held_out_documents_are_others(built: Path, tmp_path: Path) -> None:
    again = build_recall(tmp_path, lengths=(64, 256), tokens=1024, heldout_tokens=512)
    assert again["counts"] == {"warmup": 8, "train-64": 16, "train-256": 4, "heldout-64": 8, "heldout-256": 2}
    for split in again["counts"]:
        for ours, theirs in zip(shards_of(tmp_path, split), shards_of(built, split), strict=True):
            assert ours.read_bytes() == theirs.read_bytes()
    assert build_recall(tmp_path, lengths=(64, 256), tokens=1024, heldout_tokens=512)["written"] == []
    training = {sample["json"] for sample in samples(built, "train-64")}
    assert len(training) == 16
    assert training.isdisjoint(sample["json"] for sample in samples(built, "heldout-64"))


def test_warm_up_documents_go_round_the_same_facts(built: Path) -> None:
    for sample in samples(built, "warmup"):
        about = json.loads(sample["json"])
        words = [word for segment in about["segments"] for word in segment["text"].split()]
        learned = [segment.get("loss", True) for segment in about["segments"] for _ in segment["text"].split()]
        assert len(words) == 63
        assert set(words) <= {*KEYS, *VALUES, *FILLER}
        following: dict[str, str] = {}
        for before, word, is_learned in zip(words, words[1:], learned[1:], strict=False):
            if is_learned:
                assert following[before] == word  # what is to be told can be told
            if before not in FILLER and word not in FILLER:
                assert following.setdefault(before, word) == word
        assert sum(learned) > 63 // 3


@pytest.mark.parametrize("wrong", [{"lengths": (32,)}, {"lengths": (4096,)}, {"lengths": ()}, {"picture_tokens": 0}])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="lengths should be from 64 up to tokens=1024"):
        build_recall(tmp_path, **({"lengths": (64,), "tokens": 1024, "heldout_tokens": 1024} | wrong))


def test_long_documents_with_picture_values_leave_keys_to_the_stream() -> None:
    for length in (8192, 32768):
        document = write_document(length, np.random.default_rng(0), picture_values=True)
        tokens = laid_out(document, 1)
        assert len(tokens) == length - 1
        asked = [tokens[question.fact[0]] for question in document.questions if question.kind in ("recall", "shown")]
        assert Counter(question.kind for question in document.questions) == dict.fromkeys([*KINDS, "shown"], 32)
        assert len(set(asked)) == 64
        assert len((set(tokens) & set(KEYS)) - set(asked)) >= 32
