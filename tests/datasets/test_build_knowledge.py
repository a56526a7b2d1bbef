"""`mmctx data build knowledge`: what it teaches and what it asks."""

from __future__ import annotations

import json
from pathlib import Path

import webdataset

from mmctx.datasets.build.knowledge import build_knowledge
from mmctx.datasets.build.recall_words import KEYS, NAMES, NUM_PICTURES, VALUES, draw_picture
from mmctx.eval.suites.knowledge import read_questions
from mmctx.tokenizer import TextTokenizer


def test_pairs_documents_and_questions(tmp_path: Path) -> None:
    answer = build_knowledge(tmp_path / "a", documents=12, pairs=64)
    assert answer["counts"] == {"warmup": 12, "read": 12, "pairs": 64, "heldout": 2}
    tokenizer = TextTokenizer(tmp_path / "a" / "tokenizer")
    pictures = {draw_picture(n): KEYS[n] for n in range(NUM_PICTURES)}
    kinds = set()
    for sample in webdataset.WebDataset(str(tmp_path / "a/pairs/knowledge-000000.tar"), shardshuffle=False):
        question = json.loads(sample["json"])["question"]
        if "png" in sample:
            assert pictures[sample["png"]] == question
        else:
            fact = sample["txt"].decode()
            assert fact.removeprefix(f"{question} ") in VALUES
            assert question.removeprefix("a code for ") in NAMES
            assert len(tokenizer.encode(fact)) == 5
            assert tokenizer.decode(tokenizer.encode(fact)) == fact  # a token a word, none unknown
        kinds.add("png" in sample)
    assert kinds == {True, False}
    for split, length in (("warmup", 64), ("read", 128)):
        for sample in webdataset.WebDataset(str(tmp_path / f"a/{split}/knowledge-000000.tar"), shardshuffle=False):
            segments = json.loads(sample["json"])["segments"]
            texts = [tokenizer.encode(segment["text"]) for segment in segments if "text" in segment]
            assert sum(map(len, texts)) + sum("image" in segment for segment in segments) + 1 == length  # and the end
    questions = read_questions(tmp_path / "a" / "questions.jsonl")
    assert sum(question.asked for question in questions) == 64 + 16
    assert {question.image is None for question in questions} == {True, False}
    build_knowledge(tmp_path / "b", documents=12, pairs=64)
    for path in (tmp_path / "a").rglob("*.*"):
        if path.suffix in (".tar", ".jsonl"):
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
