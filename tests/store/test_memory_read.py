"""Documents from shards, folders and tables, against what was put there; and what becomes of them in a store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from made_stores import unit_vectors
from tiny import book, flac, png, triple, write_shard

from mmctx.datasets.build.members import LeftOut
from mmctx.errors import DataError
from mmctx.store.entries import Document, Part
from mmctx.store.ingest import ingest
from mmctx.store.provenance import Provenance
from mmctx.store.read import Inputs, media_bytes, read_ids
from mmctx.store.store import Store


class Hashes:
    """An encoder that gives each content a direction of its own, and counts what it embeds."""

    provenance = Provenance("hashes", "00112233", 16, ("text", "image"))

    def __init__(self) -> None:
        self.count = 0

    def prepare(self, kind: str, value: str | bytes) -> int:
        return (
            int(Part(kind, value, None).content, 16)
            if isinstance(value, str)
            else int(Part(kind, media=value).content, 16)
        )  # type: ignore[arg-type]

    def embed(self, prepared: list[int]) -> np.ndarray:
        self.count += len(prepared)
        return np.stack([unit_vectors(1, 16, seed) for seed in prepared])[:, 0]


def read(*arguments, **options) -> tuple[dict[str, Document], list[LeftOut]]:
    found = list(Inputs(*arguments, **options))
    documents = [entry for entry in found if isinstance(entry, Document)]
    return {document.id: document for document in documents}, [entry for entry in found if isinstance(entry, LeftOut)]


def test_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-0.tar", [triple(1), triple(2)])
    write_shard(tmp_path / "a-1.tar", [book(4)])
    found, left_out = read(str(tmp_path / "a-*.tar"), ("txt", "json:names.other"))
    assert (list(found), left_out) == (["triple0001", "triple0002", "book0004"], [])
    text = triple(2)["txt"].decode()
    expected = (
        Part("image", media=png(2)),
        Part("audio", media=triple(2)["flac"]),
        Part("text", text),
        Part("text", text[::-1]),
    )
    assert found["triple0002"].parts == expected
    assert found["triple0002"].facts == {"names": {"other": text[::-1]}}
    made = book(4)
    segments = json.loads(made["json"])["segments"]
    for part, segment in zip(found["book0004"].parts, segments, strict=True):
        ((kind, value),) = segment.items()
        assert (part.kind, part.text or part.media) == (kind, value if kind == "text" else made[value])
    assert found["book0004"].facts == {}
    prefixed, _ = read(str(tmp_path / "a-*.tar"), prefix="x/")
    assert list(prefixed) == ["x/triple0001", "x/triple0002", "x/book0004"]


def test_media_by_path(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [triple(1), triple(2), book(4)])
    store, encoder = Store.create(tmp_path / "store", Hashes.provenance), Hashes()
    ingest(store, encoder, Inputs(str(shard), by_path=True))
    kept = store.documents(["triple0002", "book0004"])
    picture = kept["triple0002"].parts[0]
    assert (picture.media, picture.path) == (None, f"{shard}#triple0002.png")
    assert media_bytes(picture) == png(2)
    whole, _ = read(str(shard))
    for part, other in zip(kept["book0004"].parts, whole["book0004"].parts, strict=True):
        assert part.kind == "text" or media_bytes(part) == other.media
    assert kept["triple0002"].shown == whole["triple0002"].shown
    hits = store.search(encoder.embed([encoder.prepare("image", png(2))]), 1)[0]
    assert (hits[0].id, round(hits[0].score, 4)) == ("triple0002", 1.0)
    write_shard(tmp_path / "b.tar", [triple(2) | {"png": png(77)}])
    (tmp_path / "b.tar").replace(shard)
    from mmctx.store.read import _opened

    _opened.cache_clear()
    with pytest.raises(DataError, match=r"a.tar#triple0002.png: not what was added"):
        media_bytes(picture)
    with pytest.raises(DataError, match="the shard has no sample 'book0004' any more"):
        media_bytes(next(part for part in kept["book0004"].parts if part.kind != "text"))


def test_folders_and_tables(tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    folder.mkdir()
    for name, data in {
        "dog.png": png(1),
        "dog.flac": flac(1),
        "dog.txt": b"a dog",
        "cat.png": png(2),
        "lost.png": png(3),
    }.items():
        (folder / name).write_bytes(data)
    (folder / "cat.txt").write_text("a cat")
    found, left_out = read(str(folder))
    assert {id: [part.kind for part in document.parts] for id, document in found.items()} == {
        "dog": ["image", "audio", "text"],
        "cat": ["image", "text"],
    }
    assert [(entry.key, entry.reason) for entry in left_out] == [("lost.png", "no_text")]
    table = tmp_path / "facts.jsonl"
    rows = [
        {"id": "1", "text": "the sky is blue", "year": 2020},
        {"id": "2", "text": "x", "image": "pets/dog.png"},
        {"id": "3", "text": " "},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, left_out = read(str(table))
    assert found["1"].parts == (Part("text", "the sky is blue"),)
    assert found["1"].facts == {"year": 2020}
    assert found["2"].parts == (Part("image", media=png(1)), Part("text", "x"))
    assert [(entry.key, entry.reason) for entry in left_out] == [("3", "empty")]
    with pytest.raises(DataError, match="by path in shards alone"):
        Inputs(str(table), by_path=True)
    with pytest.raises(DataError, match="matches no file"):
        Inputs(str(tmp_path / "none-*.tar"))


def test_only_what_changed_is_embedded(tmp_path: Path) -> None:
    store, encoder = Store.create(tmp_path / "store", Hashes.provenance), Hashes()
    facts = [Document(f"d{n}", (Part("text", f"fact {n}"),)) for n in range(30)]
    assert ingest(store, encoder, facts).summary() == {"added": 30, "updated": 0, "unchanged": 0, "left_out": {}}
    version = store.version
    assert ingest(store, encoder, facts).summary() == {"added": 0, "updated": 0, "unchanged": 30, "left_out": {}}
    assert (encoder.count, store.version) == (30, version)
    facts[3] = Document("d3", (Part("text", "another fact"),))
    clip = Document("clip", (Part("audio", media=flac(1)),))
    mixed = Document("mixed", (Part("audio", media=flac(1)), Part("text", "a noise")))
    found = ingest(store, encoder, [*facts, mixed, clip, facts[5], LeftOut("row", "empty", "")])
    assert found.summary() == {
        "added": 1,
        "updated": 1,
        "unchanged": 29,
        "left_out": {"duplicate_key": 1, "empty": 1, "no_vector": 1},
    }
    assert encoder.count == 32
    assert store.documents(["d3"])["d3"].parts[0].text == "another fact"
    assert [part.media for part in store.documents(["mixed"])["mixed"].parts] == [flac(1), None]


def test_a_second_encoder_is_refused(tmp_path: Path) -> None:
    store, encoder = Store.create(tmp_path / "store", Hashes.provenance), Hashes()
    encoder.provenance = Provenance("others", "deadbeef", 16, ("text",))
    with pytest.raises(DataError, match=r"'hashes' \(00112233\), asked with 'others' \(deadbeef\)"):
        ingest(store, encoder, [])


def test_ids_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    path.write_text('a b\n\n{"id": "c", "text": "x"}\nd\n')
    assert read_ids(path) == ["a b", "c", "d"]
    path.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"ids: line 1: expected a string under 'id', found None"):
        read_ids(path)
