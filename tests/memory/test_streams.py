"""Long documents read piece by piece: the plan's lanes, what is carried, and runs that are killed in the middle of a document."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import make_tokenizer, png, tiny_tree, words, write_shard
from torch import Tensor

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.plan import Plan, share_out
from mmctx.datasets.planning.split import cut_stream
from mmctx.errors import DataError, MmctxError
from mmctx.jsonl import read_lines
from mmctx.lane import Lane
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.train import loop
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.course import forecast_run
from mmctx.train.lanes import read_lanes
from mmctx.train.loop import train
from mmctx.train.replay import replay

WINDOWS = {"windows": [4, 6], "memory": {"layers": [1], "top_k": 5, "tokens": 50}, "dropout": 0.0}


def story(seed: int) -> dict[str, Any]:
    """A text of up to a few hundred tokens with pictures in it."""
    sample: dict[str, Any] = {"__key__": f"story{seed:04d}"}
    segments: list[dict[str, str]] = []
    for number in range(1 + 3 * (seed % 5)):
        segments.append({"text": words(10 * seed + number, 12)})
        sample[f"{number}.png"] = png(10 * seed + number)
        segments.append({"image": f"{number}.png"})
    return sample | {"json": json.dumps({"segments": [*segments, {"text": words(seed, 5)}]}).encode()}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    root = tmp_path_factory.mktemp("stories")
    write_shard(root / "stories-000000.tar", [story(seed) for seed in range(11)])
    plain = [{"__key__": f"plain{n}", "txt": words(n, 20 * n + 1).encode()} for n in range(5)]
    write_shard(root / "plain-000000.tar", [*plain, {"__key__": "empty", "txt": b""}])
    make_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def streamed(stories: Path, corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """Stories and plain texts along two lanes, triples packed beside them."""
    tree = tiny_tree(corpus, tmp_path / "runs")
    sources = tree["data"]["sources"]
    del sources["books"]
    stream = {"objectives": ["captioning"], "long_documents": "stream"}
    sources["stories"] = stream | {"shards": str(stories / "stories-*.tar")}
    sources["plain"] = stream | {"shards": str(stories / "plain-*.tar")}
    tree["data"] |= {"context_length": 50, "bin_tokens": 200, "bins_per_step": 2, "window_steps": 2}
    tree["model"]["transformer"] |= copy.deepcopy(WINDOWS)
    tree["train"] |= {"steps": 12, "save_every": 5, "keep": {"last": 10}}
    tree["eval"]["sources"] = {}
    return tree


def opened(tree: dict[str, Any]) -> tuple[RunConfig, RunData, Plan]:
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=1)
    return config, data, Plan(config.data, data.tables, 1)


def whole_document(data: RunData, number: int, sample: int) -> Document:
    """What the objective makes of the whole sample."""
    decoded = data.dataset.sample(number, sample)
    (document,) = data.dataset.objectives["captioning"].documents(decoded, np.random.default_rng(0), None)
    return document


@given(st.data(), st.integers(1, 20))
def test_pieces_cover_a_document_and_cut_no_media(data: st.DataObject, room: int) -> None:
    spans, offset = [], 0
    for _ in range(data.draw(st.integers(0, 6))):
        offset += data.draw(st.integers(0, 2 * room))
        size = data.draw(st.integers(1, room))
        spans.append((offset, size))
        offset += size
    length = offset + data.draw(st.integers(1, room))
    stops = [0, *cut_stream(length, spans, room)]
    assert stops[-1] == length
    for start, stop in pairwise(stops):
        assert 0 < stop - start <= room
    assert not any(start < stop < start + size for stop in stops for start, size in spans)


def test_lanes_read_every_document_in_order(streamed: dict[str, Any]) -> None:
    _, data, plan = opened(streamed)
    sizes = {number: table.num_samples for number, table in enumerate(data.dataset.tables) if table.is_stream}
    names = [table.source.name for table in data.dataset.tables]
    assert plan.streams is not None
    read: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for step in range(plan.streams._pieces[0] + plan.streams._pieces[1]):
        for lane, bin in enumerate(plan.step(step)[:2]):
            assert bin.lane == lane
            number, sample, epoch, part = bin.samples[0]
            assert number in sizes
            assert not any(other[0] in sizes for other in bin.samples[1:])
            read.setdefault((number, sample, epoch), []).append((step, part))
            batch = data.dataset[bin]
            assert batch.num_tokens == bin.tokens <= streamed["data"]["bin_tokens"]
            assert batch.stream_start == batch.position_ids[0]
    for places in read.values():  # one piece after another, none left out but where we stopped
        assert [part for _, part in places] == list(range(len(places)))
        assert [step for step, _ in places] == list(range(places[0][0], places[0][0] + len(places)))
    first = {key[:2] for key in read if key[2] == 0}
    usable = {(number, n) for number, size in sizes.items() for n in range(size)}
    assert first == usable - {(names.index("plain"), 5)}
    told = [entry for step in range(40) for bin in plan.step(step) for entry in bin.left_out if entry[0] in sizes]
    assert {entry[:2] for entry in told} == {(names.index("plain"), 5)}  # it has no text


def test_pieces_put_together_are_the_document(streamed: dict[str, Any]) -> None:
    _, data, _ = opened(streamed)
    for number, table in enumerate(data.dataset.tables):
        if not table.is_stream:
            continue
        units = table.units(np.arange(table.num_samples))
        for sample in np.flatnonzero(units.reasons == 0).tolist():
            whole = whole_document(data, number, sample)
            mine = np.flatnonzero(units.owner == sample)
            pieces = [data.dataset.documents(number, sample, 0, part)[0] for part in range(len(mine))]
            assert [len(piece.input_ids) for piece in pieces] == units.sizes[mine, 0].tolist()
            assert [len([i for _, i in p.media if i.kind == "image"]) for p in pieces] == units.sizes[mine, 1].tolist()
            assert [piece.start for piece in pieces] == np.cumsum([0, *units.sizes[mine, 0]])[:-1].tolist()
            for name in ("input_ids", "labels"):
                np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name))
            media = [(offset + (piece.start or 0), item) for piece in pieces for offset, item in piece.media]
            assert [offset for offset, _ in media] == [offset for offset, _ in whole.media]
            assert all(torch.equal(a.values, b.values) for (_, a), (_, b) in zip(media, whole.media, strict=True))
            with pytest.raises(DataError, match="promises piece"):
                data.dataset.documents(number, sample, 0, len(mine))


def test_ranks_share_the_lanes(streamed: dict[str, Any]) -> None:
    streamed["data"]["bins_per_step"] = 4
    _, _, plan = opened(streamed)
    for step in range(30):
        bins = plan.step(step)
        for ranks in (1, 2, 4):
            shares = [share_out(bins, rank, ranks) for rank in range(ranks)]
            assert sorted(number for share in shares for number, _ in share) == list(range(len(bins)))
            assert len({len(share) for share in shares}) == 1
            for rank, share in enumerate(shares):
                lanes = [bin.lane for _, bin in share if bin.lane is not None]
                assert lanes == list(range(rank * 4 // ranks, (rank + 1) * 4 // ranks))


def read_along(model: MmctxModel, pieces: list[PackedBatch]) -> Tensor:
    lane, found = Lane(), []
    for piece in pieces:
        assert piece.stream_start is not None
        lane.open(piece.stream_start)
        found.append(model.encode(replace(piece, lane=lane))[: piece.layout.lengths[0]])
        lane.commit()
    return torch.cat(found)


@pytest.mark.parametrize("distances", ["clamped", "exact"])
@pytest.mark.parametrize("tokens", [30, 10_000])
def test_a_document_in_pieces_is_read_as_at_once(streamed: dict[str, Any], distances: str, tokens: int) -> None:
    streamed["model"]["transformer"]["memory"] |= {"distances": distances, "tokens": tokens}
    config, data, _ = opened(streamed)
    model = build_model(config, len(data.tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    number = list(data.tables).index("stories")
    sample = 9  # thirteen pictures
    ids = data.tokenizer.placeholder_ids
    count = int((data.dataset.tables[number].units(np.array([sample])).owner == 0).sum())
    assert count > 3
    other = data.dataset.documents(list(data.tables).index("triples"), 0, 0)
    pieces = [pack_documents([*other, *data.dataset.documents(number, sample, 0, part)], ids) for part in range(count)]
    whole = pack_documents([whole_document(data, number, sample)], ids)
    with torch.no_grad():
        expected, found = model.encode(whole), read_along(model, pieces)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        alone = torch.cat([model.encode(piece)[: piece.layout.lengths[0]] for piece in pieces])
    assert not torch.allclose(alone, expected, atol=1e-2)  # the test could fail


def test_what_is_carried_is_bounded_and_comes_back(streamed: dict[str, Any]) -> None:
    config, data, _ = opened(streamed)
    model = build_model(config, len(data.tokenizer))
    number, ids = list(data.tables).index("stories"), data.tokenizer.placeholder_ids
    pieces = [pack_documents(data.dataset.documents(number, 9, 0, part), ids) for part in range(4)]
    lane = Lane()
    for piece in pieces[:3]:
        lane.open(piece.stream_start or 0)
        model.encode(replace(piece, lane=lane))
        lane.commit()
    assert {n: len(past.k) for n, past in lane.layers.items()} == {0: 3, 1: 6 + 50 - 1}
    assert not any(t.requires_grad for t in lane.state().values())
    again = Lane.restored({name: tensor.clone() for name, tensor in lane.state().items()}, "cpu")
    for one in (lane, again):
        one.open(pieces[3].stream_start or 0)
    mine, theirs = (model.eval().encode(replace(pieces[3], lane=one)) for one in (lane, again))
    assert torch.equal(mine, theirs)
    lane.open(7)  # of a place that it does not hold
    assert not lane.layers


def weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    folder = run_dir / f"checkpoint-{step}"
    return load_file(folder / "model.safetensors") | read_lanes(folder)


def run(tree: dict[str, Any], name: str, **data: Any) -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["data"] |= data
    return build_config(RunConfig, tree, "tree")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_within_a_document_ends_bitwise_equal(
    streamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After step 5 both lanes stand in the middle of a document; all that came after it is lost."""
    streamed["train"]["activations"] = {"checkpoint": "selective"}
    whole = train(run(streamed, "whole")).run_dir
    _, _, plan = opened(streamed)
    assert all(plan.step(5)[lane].samples[0][3] > 0 for lane in (0, 1)), "choose another step"
    killed = train(run(streamed, "killed")).run_dir
    lose_what_came_after(killed, 5)
    train(run(streamed, "killed"))
    expected, found = weights(whole, 12), weights(killed, 12)
    assert expected.keys() == found.keys()
    assert sum(name.endswith(".far_k") for name in expected) == 2
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    lines = [
        [(x["step"], x["loss"], x["batch_fingerprint"]) for x in read_lines(d / "metrics.jsonl")]
        for d in (whole, killed)
    ]
    assert lines[0] == lines[1]
    assert replay(killed, 7).fingerprint == lines[0][6][2]
    lose_what_came_after(killed, 5)
    monkeypatch.setattr(loop, "read_lanes", lambda checkpoint: {})
    train(run(streamed, "killed"))  # without what was carried, it ends otherwise
    assert not any(torch.equal(expected[name], other) for name, other in weights(killed, 12).items() if "trunk" in name)


def lose_what_came_after(run_dir: Path, step: int) -> None:
    for folder in run_dir.glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > step:
            (folder / "COMPLETE").unlink()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_equal_one(streamed: dict[str, Any], tmp_path: Path) -> None:
    """Begun by two processes, killed in the middle of a document, and gone on with by one."""
    alone = train(run(streamed, "alone")).run_dir
    path = tmp_path / "two.json"
    tree = json.loads(json.dumps(streamed))
    tree["run"]["name"] = "two"
    path.write_text(json.dumps(tree))
    two = Path(tree["run"]["dir"]) / "two"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmctx.train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 600
    while not (two / "checkpoint-5" / "COMPLETE").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    lose_what_came_after(two, 5)
    assert {name.partition(".")[0] for name in read_lanes(two / "checkpoint-5")} == {"0", "1"}  # of both ranks
    for name, tensor in weights(alone, 5).items():
        torch.testing.assert_close(weights(two, 5)[name], tensor, atol=1e-4, rtol=1e-3)
    train(run(streamed, "two"))
    lines = [list(read_lines(d / "metrics.jsonl")) for d in (alone, two)]
    assert [line["batch_fingerprint"] for line in lines[0]] == [line["batch_fingerprint"] for line in lines[1]]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_plan_begins_anew(streamed: dict[str, Any]) -> None:
    """Pieces of another size: a new segment, nothing carried, another pass over the streams; packed sources go on in their epoch."""
    streamed["train"]["steps"] = 5
    first = train(run(streamed, "grows")).run_dir
    streamed["train"]["steps"] = 7
    second = run(streamed, "grows", context_length=60)
    train(second)
    tree = json.loads((first / "segments.json").read_text())
    assert [segment["start"]["step"] for segment in tree] == [0, 5]
    drawn = tree[1]["start"]["drawn"]
    assert drawn["stories"] == 11
    assert drawn["plain"] == 6
    assert drawn[""] > 0
    expected = [line["batch_fingerprint"] for line in read_lines(first / "metrics.jsonl")]
    assert [replay(first, step).fingerprint for step in (2, 6, 7)] == [expected[step - 1] for step in (2, 6, 7)]


def test_streams_alone_are_forecast(streamed: dict[str, Any]) -> None:
    del streamed["data"]["sources"]["triples"]
    streamed["data"] |= {"bin_tokens": 50}
    config, _, plan = opened(streamed)
    assert plan.window_steps == 1
    found = forecast_run(config, "tree")["stages"][0]
    assert found["tokens"] == sum(bin.tokens for step in range(12) for bin in plan.step(step))
    assert found["sources"]["stories"]["drawn"] == 11
    heads, rows = (
        2 * 8,
        {0: 3, 1: 6 + 50 - 1},
    )  # keys, values, and in the layer with a memory keys as they stand to far queries
    assert found["memory"]["lanes"] >= 2 * 4 * heads * (2 * rows[0] + 3 * rows[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["data"]["sources"]["stories"].update(weight=1.0), "has no meaning for a stream"),
        (lambda t: t["data"]["sources"]["stories"].update(objectives=["masked_lm"]), "of kinds .'masked_lm'."),
        (lambda t: t["data"].update(bin_images=5), "cut by tokens alone"),
        (lambda t: t["data"].update(bin_tokens=99), "at least 2 . context_length = 100"),
        (lambda t: t["train"].update(sequence_parallel=2), "lies on one process"),
        (lambda t: t["eval"].update(sources={"x": t["data"]["sources"]["stories"]}), "read whole and in any order"),
    ],
)
def test_what_cannot_be_streamed_is_refused(streamed: dict[str, Any], change: Any, message: str) -> None:
    change(streamed)
    with pytest.raises(MmctxError, match=message):
        build_config(RunConfig, streamed, "tree")


def test_more_lanes_than_documents_are_refused(streamed: dict[str, Any]) -> None:
    streamed["data"]["bins_per_step"] = 32
    config = build_config(RunConfig, streamed, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=1)
    with pytest.raises(DataError, match="there are 16 usable documents"):
        Plan(config.data, data.tables, 1)
