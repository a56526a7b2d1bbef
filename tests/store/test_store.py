"""The store against brute force and plain dictionaries, through additions, changes and removals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")

from made_stores import DIM, MADE_BY, brute_force, found_rows, said, text_store, unit_vectors

from mmctx.errors import ConfigError, DataError, MmctxError
from mmctx.store import index
from mmctx.store.entries import Document, Part, Triple
from mmctx.store.lock import writing
from mmctx.store.provenance import Provenance
from mmctx.store.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_exact_search_equals_brute_force(tmp_path: Path) -> None:
    vectors, queries = unit_vectors(700), unit_vectors(20, seed=1)
    store = text_store(tmp_path / "store", vectors, at_once=300)
    hits = store.search(queries, 10, exact=True)
    assert [[int(hit.id[1:]) for hit in found] for found in hits] == brute_force(queries, vectors, 10)
    for query, found in zip(queries, hits, strict=True):
        scores = [float(query @ vectors[int(hit.id[1:])]) for hit in found]
        np.testing.assert_allclose([hit.score for hit in found], scores, atol=1e-5)
    assert [len(found) for found in store.search(queries, 1000, exact=True)] == [700] * 20  # fewer than asked for


def test_edits_equal_a_dictionary(tmp_path: Path) -> None:
    """Random additions, changes and removals, with an index made in the middle: always what brute force finds in the survivors."""
    rng = np.random.default_rng(0)
    vectors = unit_vectors(400)
    store = text_store(tmp_path / "store", vectors[:200])
    alive = {n: n for n in range(200)}  # document -> the row that it shows now
    queries = unit_vectors(10, seed=3)
    for turn in range(12):
        some = rng.choice(400, 20, replace=False).tolist()
        if turn % 3 == 2:
            there = [n for n in some if n in alive]
            assert store.remove([f"d{n}" for n in some]) == len(there)
            for n in there:
                del alive[n]
        else:
            rows = rng.choice(400, 20, replace=False).tolist()
            rows = [row for row in rows if row not in alive.values()][: len(some)]  # ties would have no order
            some = some[: len(rows)]
            store.write(
                [said(n, f"row {row}") for n, row in zip(some, rows, strict=True)], [[vectors[r]] for r in rows]
            )
            alive |= dict(zip(some, rows, strict=True))
        names = {row: n for n, row in alive.items()}
        expected = [[names[row] for row in found] for found in brute_force(queries, vectors, 8, sorted(names))]
        assert found_rows(store, queries, 8, exact=True) == expected
        assert store.ids() == sorted(f"d{n}" for n in alive)
        assert len(store) == len(alive)


def test_a_change_is_one_version_and_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    vectors = unit_vectors(6)
    whole = Document(
        "x", (Part("text", "one"), Part("image", media=b"picture"), Part("text", "two")), {"page": 3}, "book"
    )
    store.write([whole, said(1)], [[vectors[0], vectors[1], vectors[2]], [vectors[3]]])
    before = store.version
    shorter = Document("x", (Part("text", "three"),), {"page": 4}, "book", Triple("a", "b", "c"))
    store.write([shorter], [[vectors[4]]])
    assert store.version == before + 1
    assert [(hit.id, hit.text) for hit in store.search(vectors[4], 10)[0][:1]] == [("x", "three")]
    assert {hit.text for hit in store.search(vectors[0], 10)[0]} == {"three", "text 1"}
    (kept,) = store.documents(["x", "y"]).values()
    assert (kept.facts, kept.triple, kept.source) == ({"page": 4}, Triple("a", "b", "c"), "book")
    assert kept.parts[0].text == "three"
    assert kept.digest == shorter.digest == store.digests(["x"])["x"]


def test_parts_without_vectors_are_kept_and_not_found(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    vectors = unit_vectors(2)
    document = Document(
        "x", (Part("text", "a cat"), Part("audio", media=b"\x00sound"), Part("image", media=b"p" * 1000))
    )
    store.write([document], [[vectors[0], None, vectors[1]]])
    assert store.documents(["x"])["x"].parts[1].media == b"\x00sound"
    assert store.documents(["x"])["x"].digest == document.digest
    assert [(hit.kind, hit.part) for hit in store.search(vectors[1], 5)[0]] == [("image", 2), ("text", 0)]
    assert [hit.kind for hit in store.search(vectors[1], 5, kinds=("text",))[0]] == ["text"]
    assert store.search(vectors[1], 5, kinds=("audio",)) == [[]]
    assert store.describe()["parts"] == {"text": 1, "image": 1, "audio": 1}
    assert list(store.vectors("shown", [document.shown])) == [document.shown]


def test_what_is_removed_is_not_found_through_an_older_index_and_erased_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "SMALLEST", 500)
    vectors = unit_vectors(2000)
    store = text_store(tmp_path / "store", vectors)
    store.write([said(3, "a secret word: xylophone-7193")], [[vectors[3]]])
    assert store.build_index()["recall"] >= 0.97
    reader, other = Store.open(store.path), np.arange(2000) != 3
    assert reader.search(vectors[3], 1)[0][0].text == "a secret word: xylophone-7193"
    assert store.remove(["d3", "d4"]) == 2
    assert store.remove(["d3"]) == 0
    for exact in (True, False):
        assert not {3, 4} & set(found_rows(reader, vectors[3], 2000, exact=exact)[0])
    assert reader.documents(["d3"]) == {}
    assert "d3" not in reader.ids()
    assert _on_disk(store.path, b"xylophone-7193")  # in files of older versions
    store.erase()
    assert not _on_disk(store.path, b"xylophone-7193")
    among = [n for n in range(2000) if n != 4 and other[n]]
    assert found_rows(reader, vectors[:5], 10, exact=True) == brute_force(vectors[:5], vectors, 10, among)
    assert Store.open(store.path).provenance == store.provenance


def _on_disk(folder: Path, text: bytes) -> bool:
    return any(text in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_snapshot_stands_still(tmp_path: Path) -> None:
    vectors = unit_vectors(50)
    store = text_store(tmp_path / "store", vectors)
    still = store.snapshot()
    store.remove(["d7"])
    store.write([said(100)], [[unit_vectors(1, seed=9)[0]]])
    assert found_rows(still, vectors[7], 1, exact=True) == [[7]]
    assert len(still) == 50
    assert len(store) == 50
    assert store.version == still.version + 2
    assert found_rows(store, vectors[7], 1, exact=True) != [[7]]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    good = unit_vectors(1)[0]
    for vector, message in [
        (good[:5], rf"'d1'.*shape \(5,\).*have {DIM}"),
        (good * 2, "length 2, those of a store have length 1"),
        (good * np.nan, "length nan"),
    ]:
        with pytest.raises(DataError, match=message):
            store.write([said(1)], [[vector]])
    with pytest.raises(DataError, match="'d1' comes twice"):
        store.write([said(1), said(1)], [[good], [good]])
    with pytest.raises(DataError, match="'x' has no parts"):
        store.write([Document("x", ())], [[]])
    assert len(store) == 0
    with pytest.raises(DataError, match=rf"5 numbers, its vectors have {DIM}"):
        store.search(good[:5])


def test_ids_may_hold_anything(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    names = ["it's", 'say "x"', "a/b%2E", "100% or 1=1 --", "日本", "back\\slash", "'; DROP TABLE entries; --"]
    vectors = unit_vectors(len(names))
    store.write([Document(name, (Part("text", name),), source=name) for name in names], [[v] for v in vectors])
    for name in names:
        assert set(store.documents([name])) == {name}
    assert store.remove(names[:1]) == 1
    assert store.remove(source=names[3]) == 1
    assert store.ids() == sorted({*names} - {names[0], names[3]})


def test_another_encoder_is_named(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    again = Store.open(tmp_path / "store")
    assert again.provenance == MADE_BY
    again.provenance.check(
        Provenance("elsewhere", MADE_BY.fingerprint, DIM, ("text",)), again.path
    )  # moved: the same weights
    other = Provenance("other", "fedcba9876543210", 7, ("text",))
    with pytest.raises(
        DataError,
        match=rf"made by the encoder 'made' \(0123.*asked with 'other' \(fedc.*dim {DIM} against 7.*--encoder",
    ):
        store.provenance.check(other, store.path)


def test_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no knowledge store.*mmctx memory build"):
        Store.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        Store.create(tmp_path / "full", MADE_BY)
    Store.create(tmp_path / "store", MADE_BY)
    with pytest.raises(DataError, match=r"a store already.*mmctx memory add"):
        Store.create(tmp_path / "store", MADE_BY)
    import lancedb
    import pyarrow as pa

    lancedb.connect(str(tmp_path / "foreign")).create_table("entries", pa.table({"a": [1]}))
    with pytest.raises(DataError, match="no store of mmctx"):
        Store.open(tmp_path / "foreign")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", MADE_BY)
    store.timeout = 0.2
    held = "import sys, time; from pathlib import Path; from mmctx.store.lock import writing\n"
    held += "with writing(Path(sys.argv[1]), 1): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", held, str(store.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(MmctxError, match=f"process {holder.pid} has been writing for 0.2 s"):
            store.write([said(1)], [[unit_vectors(1)[0]]])
        assert store.search(unit_vectors(1)) == [[]]  # readers do not wait
        holder.kill()
    store.write([said(1)], [[unit_vectors(1)[0]]])  # the kernel let go
    with writing(store.path, 0.1):
        assert (store.path / ".lock").read_text() == str(os.getpid())


def test_the_index_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On vectors without any structure, which clusters serve worst: more clusters are visited until recall is reached."""
    monkeypatch.setattr(index, "SMALLEST", 1000)
    even = unit_vectors(3000, rank=DIM)
    store = text_store(tmp_path / "store", even)
    with pytest.raises(ConfigError, match="ivf or hnsw, not 'tree'"):
        store.build_index("tree")
    about = store.build_index(recall=0.97)
    assert about == json.loads((store.path / "index.json").read_text()) == store.describe()["index"]
    assert about["recall"] >= 0.97
    queries = unit_vectors(100, seed=5, rank=DIM)
    near, best = found_rows(store, queries, 10), brute_force(queries, even, 10)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(near, best, strict=True)]) >= 0.93
    assert store.build_index(recall=0.5)["probes"] < about["probes"]
    monkeypatch.setattr(index, "SMALLEST", 5000)
    assert store.build_index() == {}  # too small: exact
    assert found_rows(store, queries, 10) == best
