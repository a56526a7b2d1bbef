"""`mmctx memory` as scripts use it: a run's own head, shards, edits, queries by text, picture and sound."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import flac, png, triple, write_shard

pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")

from mmctx.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A command in this process: the program's own entry, its exit code and what it prints."""

    def call(*arguments: str | Path, code: int = 0) -> Any:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mmctx", "memory", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert (stopped.value.code or 0) == code, err
        return json.loads(out) if "--json" in arguments else out + err

    return call


def test_a_store_from_start_to_end(run, run_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shard = write_shard(tmp_path / "a.tar", [triple(n) for n in range(40)])
    built = run("build", store, shard, "--encoder", run_dir, "--json")
    assert (built["added"], built["documents"], built["parts"]) == (40, 40, {"text": 40, "image": 40, "audio": 40})
    assert run("build", store, shard, "--encoder", run_dir, "--json")["unchanged"] == 40  # goes on
    (tmp_path / "q.png").write_bytes(png(7))
    (tmp_path / "q.flac").write_bytes(triple(9)["flac"])
    for question, kind, id in [
        (("--image", tmp_path / "q.png"), "image", "triple0007"),
        (("--audio", tmp_path / "q.flac"), "audio", "triple0009"),
    ]:
        (hit,) = run("query", store, *question, "-k", "1", "--json")["hits"]
        assert (hit["id"], hit["kind"], hit["score"]) == (id, kind, pytest.approx(1, abs=1e-4))
    text = triple(3)["txt"].decode()
    assert (
        run("query", store, "--text", text, "-k", "1", "--kind", "text", "--exact", "--json")["hits"][0]["text"] == text
    )
    (tmp_path / "edits.jsonl").write_text(json.dumps({"id": "triple0003", "text": "zebra zebra"}) + "\n")
    assert run("add", store, tmp_path / "edits.jsonl", "--json")["updated"] == 1
    assert run("query", store, "--text", "zebra zebra", "-k", "1", "--json")["hits"][0]["id"] == "triple0003"
    removed = run("remove", store, "triple0003", "triple0007", "--erase", "--json")
    assert (removed["removed"], removed["missing"], removed["documents"]) == (2, [], 38)
    hits = run("query", store, "--image", tmp_path / "q.png", "-k", "200", "--json")["hits"]
    assert len({hit["id"] for hit in hits}) == 38
    assert not {"triple0003", "triple0007"} & {hit["id"] for hit in hits}
    assert run("remove", store, "triple0003", "--json", code=1)["missing"] == ["triple0003"]
    assert run("remove", store, "--source", shard, "--json")["documents"] == 0
    assert "nothing found" in run("query", store, "--text", "a", code=1)


def test_a_graph(run, run_dir: Path, tmp_path: Path) -> None:
    store, graph = tmp_path / "store", tmp_path / "graph.tsv"
    graph.write_text("cat\tis a kind of\tfish\ndog\thas\thouse\n")
    shard = write_shard(tmp_path / "a.tar", [{"__key__": "0", "png": png(1), "txt": b"cat"}])
    options = ("--graph", "tsv", "--pictures", shard, "--relation", "is a kind of")
    built = run("build", store, graph, "--encoder", run_dir, *options, "--json")
    assert (built["documents"], built["parts"]) == (1, {"text": 1, "image": 1})
    (tmp_path / "q.png").write_bytes(png(1))
    assert run("query", store, "--image", tmp_path / "q.png", "--json")["hits"][0]["id"] == "cat|is a kind of|fish"


def test_errors(run, run_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    table = tmp_path / "facts.jsonl"
    table.write_text('{"id": "1", "text": "a cat"}\n')
    assert "a new store needs --encoder" in run("build", store, table, code=2)
    run("build", store, table, "--encoder", run_dir)
    assert "ask by one of --text, --image and --audio, found 0" in run("query", store, code=2)
    assert "not 'smell'" in run("query", store, "--text", "x", "--kind", "smell", code=2)
    assert "no.png: cannot be read" in run("query", store, "--image", tmp_path / "no.png", code=2)
    assert "undecodable_image" in run("query", store, "--image", table, code=2)
    assert "name documents to remove" in run("remove", store, code=2)
    assert "--graph is wordnet, ntriples, tsv, not 'rdf'" in run("add", store, table, "--graph", "rdf", code=2)
    assert "belong to --graph" in run("add", store, table, "--relation", "x", code=2)
    assert "holds no knowledge store" in run("info", tmp_path / "none", code=2)
    (tmp_path / "q.flac").write_bytes(flac(1))
    assert "undecodable_audio" in run("query", store, "--audio", table, code=2)
