"""Documents behind their neighbours: against brute force, read back by the run's own data side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from made_stores import brute_force
from tiny import flac, png, triple, words, write_shard

from mmctx import api
from mmctx.config import build_config
from mmctx.errors import ConfigError, DataError
from mmctx.store.encoders.base import Encoder
from mmctx.store.ingest import ingest
from mmctx.store.pack import pack_neighbours
from mmctx.store.read import Inputs
from mmctx.store.store import Store
from mmctx.train.config import RunConfig


@pytest.fixture(scope="module")
def encoder(run_dir: Path) -> Encoder:
    return api.open_encoder(str(run_dir))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Twelve triples, and copies of two of them under other names."""
    samples = [triple(n) for n in range(12)] + [triple(n) | {"__key__": f"copy{n}"} for n in (3, 4)]
    return str(write_shard(tmp_path / "train.tar", samples))


def packed(out: Path) -> dict[str, dict[str, Any]]:
    return {
        s["__key__"]: s
        for path in sorted(out.glob("train/*.tar"))
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    }


def never() -> Encoder:
    raise AssertionError("everything is in the store")


def test_neighbours_equal_brute_force(tmp_path: Path, shards: str, encoder: Encoder) -> None:
    store = Store.create(tmp_path / "store", encoder.provenance)
    heldout = write_shard(tmp_path / "heldout.tar", [triple(n) | {"__key__": f"held{n}"} for n in range(100, 110)])
    ingest(store, encoder, Inputs(shards))
    ingest(store, encoder, Inputs(str(heldout)))
    answer = pack_neighbours(store, shards, tmp_path / "out", never, neighbours=3)
    assert answer["counts"] == {"train": 14}
    found = packed(tmp_path / "out")
    ids = [id for id in store.ids() if not id.startswith("held")]  # never of another input
    vectors = store.vectors("id", ids)
    for id, sample in found.items():
        twins = {id, id.replace("copy", "triple000"), id.replace("triple000", "copy")}
        among = [other for other in ids if other not in twins]
        flat = np.concatenate([vectors[other] for other in among])  # three parts each
        best = {}
        for query, rows in zip(vectors[id], brute_force(vectors[id], flat, len(flat)), strict=True):
            for row in rows:
                best[among[row // 3]] = max(float(query @ flat[row]), best.get(among[row // 3], -1))
        expected = sorted(best, key=lambda other: best[other])[-3:]
        assert json.loads(sample["json"])["neighbours"] == expected, id
        segments = json.loads(sample["json"])["segments"]
        shown = [*expected, id]
        for place, other in enumerate(shown):
            image, audio, text = segments[4 * place : 4 * place + 3]
            made = triple(int(other.replace("triple", "").replace("copy", "")))
            assert (sample[image["image"]], sample[audio["audio"]], text["text"]) == (
                made["png"],
                made["flac"],
                made["txt"].decode(),
            )
        assert all("loss" not in segment for segment in segments)


def test_loss_on_the_answer_alone(tmp_path: Path, shards: str, encoder: Encoder, tree: dict[str, Any]) -> None:
    """A run reads the shards, and predicts nothing but the answers. The answer does not look for neighbours."""
    store = Store.create(tmp_path / "store", encoder.provenance)
    ingest(store, encoder, Inputs(shards))
    pack_neighbours(store, shards, tmp_path / "out", never, neighbours=2, learned="answer")
    tree["data"]["sources"] = {"packed": {"shards": str(tmp_path / "out/train/*.tar"), "objectives": ["captioning"]}}
    tree["data"] |= {"context_length": 600, "bin_tokens": 2400}
    tree["eval"] = {}
    config = build_config(RunConfig, tree, "tree")
    data = api.build_dataset(config)
    texts = {triple(n)["txt"].decode() for n in range(12)}
    seen = set()
    for key, number in [(s, n) for n, s in enumerate(packed(tmp_path / "out"))]:
        (document,) = data.dataset.documents(0, number, 0, 0)
        labelled = document.labels[document.labels >= 0]
        said = data.tokenizer.decode(labelled)
        assert said == triple(int(key.replace("triple", "").replace("copy", "")))["txt"].decode()
        seen.add(said)
        assert sum(len(item.values) > 0 for _, item in document.media) == 6
    assert seen == texts
    # Another answer, the same neighbours: the question alone has asked.
    changed = write_shard(tmp_path / "train2.tar", [triple(5) | {"txt": words(77, 6).encode()}])
    pack_neighbours(store, str(changed), tmp_path / "out2", never, neighbours=2, learned="answer", among=shards)
    (other,) = packed(tmp_path / "out2").values()
    mine = json.loads(packed(tmp_path / "out")["triple0005"]["json"])["neighbours"]
    found = json.loads(other["json"])["neighbours"]
    assert "triple0005" in found  # not an exact duplicate any more
    assert [id for id in found if id != "triple0005"] == mine[-1:]


def test_held_out_samples_are_embedded_and_the_bytes_depend_on_the_store_alone(
    tmp_path: Path, shards: str, encoder: Encoder
) -> None:
    store = Store.create(tmp_path / "store", encoder.provenance)
    ingest(store, encoder, Inputs(shards))
    heldout = str(
        write_shard(tmp_path / "heldout.tar", [{"__key__": "h", "png": png(500), "flac": flac(1), "txt": b"red fish"}])
    )
    with pytest.raises(DataError, match=r"nothing of the input .*heldout.tar'; it has .*train.tar"):
        pack_neighbours(store, heldout, tmp_path / "out", lambda: encoder)
    pack_neighbours(store, heldout, tmp_path / "out", lambda: encoder, among=shards, learned="own")
    (sample,) = packed(tmp_path / "out").values()
    segments = json.loads(sample["json"])["segments"]
    assert [segment["text"] for segment in segments if "text" in segment and "loss" not in segment] == ["red fish"]
    pack_neighbours(store, shards, tmp_path / "one", never)
    pack_neighbours(store, shards, tmp_path / "two", never)
    one, two = (next((tmp_path / name).glob("train/*.tar")).read_bytes() for name in ("one", "two"))
    assert one == two
    again = pack_neighbours(store, shards, tmp_path / "one", never)
    assert (again["written"], len(again["skipped"])) == ([], 1)
    store.remove(["triple0007"])
    assert pack_neighbours(store, shards, tmp_path / "one", lambda: encoder)["written"]  # another version of the store
    assert all("triple0007" not in json.loads(s["json"])["neighbours"] for s in packed(tmp_path / "one").values())
    with pytest.raises(ConfigError, match="--neighbours 0"):
        pack_neighbours(store, shards, tmp_path / "no", never, neighbours=0)
