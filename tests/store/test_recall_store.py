"""Recall: what is cited, in which order, and what a removal does to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_stores import unit_vectors
from test_memory_read import Hashes
from tiny import png

from mmctx.errors import ConfigError, DataError
from mmctx.store.entries import Document, Part, Triple
from mmctx.store.ingest import ingest
from mmctx.store.provenance import Provenance
from mmctx.store.recall import cite, recall
from mmctx.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "store", Hashes.provenance)
    documents = [
        Document("sea", (Part("text", "the sea is salt"), Part("image", media=png(1))), {"page": 7}, "book"),
        Document("sun", (Part("text", "the sun is hot"),), triple=Triple("the sun", "is", "hot")),
        *(Document(f"n{n}", (Part("text", f"noise {n}"),)) for n in range(20)),
    ]
    ingest(made, Hashes(), documents)
    return made


def test_a_prompt_with_its_citations(store: Store) -> None:
    question = [("image", png(1)), ("text", "the sun is hot")]
    found = recall(store, Hashes(), question, k=2)  # type: ignore[arg-type]
    assert {citation.document.id for citation in found.citations} == {
        "sea",
        "sun",
    }  # each has the same as one half of the query
    assert [round(citation.score, 4) for citation in found.citations] == [1.0, 1.0]
    numbers = {citation.document.id: citation.number for citation in found.citations}
    sea = [("text", f"[{numbers['sea']}] "), ("text", "the sea is salt"), ("image", png(1)), ("text", "\n")]
    sun = [("text", f"[{numbers['sun']}] "), ("text", "the sun is hot"), ("text", "\n")]
    first, second = (sea, sun) if numbers["sea"] == 2 else (sun, sea)  # the nearest stands next to the question
    assert list(found.segments) == [*first, *second, *question]
    plain = {entry["id"]: entry for entry in (citation.plain() for citation in found.citations)}
    assert plain["sea"]["parts"] == ["the sea is salt", "<image>"]
    assert (plain["sea"]["facts"], plain["sea"]["source"], plain["sea"]["version"]) == (
        {"page": 7},
        "book",
        store.version,
    )
    assert plain["sun"]["triple"] == ["the sun", "is", "hot"]


def test_what_was_changed_or_removed_is_no_more_cited(store: Store) -> None:
    asked = [("text", "the sun is hot")]
    ingest(store, Hashes(), [Document("sun", (Part("text", "the sun is cold"),))])
    assert all("hot" not in str(citation.plain()) for citation in recall(store, Hashes(), asked, k=50).citations)  # type: ignore[arg-type]
    ingest(store, Hashes(), [Document("sun", (Part("text", "the sun is hot"),))])
    reader = Store.open(store.path)
    assert recall(reader, Hashes(), asked, k=1).citations[0].document.id == "sun"  # type: ignore[arg-type]
    store.remove(["sun"])
    found = recall(reader, Hashes(), asked, k=50)  # type: ignore[arg-type]
    assert len(found.citations) == 21
    assert "sun" not in {citation.document.id for citation in found.citations}


def test_k_documents_though_the_nearest_parts_are_of_one(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", Hashes.provenance)
    vectors = unit_vectors(3, 16)
    near = vectors[0] + 1e-3 * unit_vectors(40, 16, seed=1)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    book = Document("book", tuple(Part("text", f"page {n}") for n in range(40)))
    store.write(
        [book, Document("a", (Part("text", "a"),)), Document("b", (Part("text", "b"),))],
        [list(near), *vectors[1:, None]],
    )
    assert cite(store, vectors[:1], 3)[0].document.id == "book"
    assert {citation.document.id for citation in cite(store, vectors[:1], 3)} == {"book", "a", "b"}
    assert len(cite(store, vectors[:1], 9)) == 3


def test_errors(store: Store) -> None:
    with pytest.raises(ConfigError, match="hashes: embeds text, image, the query holds audio"):
        recall(store, Hashes(), [("audio", b"x")])
    other = Hashes()
    other.provenance = Provenance("others", "deadbeef", 16, ("text",))
    with pytest.raises(DataError, match="asked with 'others'"):
        recall(store, other, [("text", "x")])
