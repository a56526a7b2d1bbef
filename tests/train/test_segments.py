"""Changes of the data on the way: what was drawn is read once, whatever changes and however often."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.datasets.shards.index import index_shards
from mmctx.datasets.shards.quarantine import QuarantineEntry, write_quarantine
from mmctx.errors import CheckpointError
from mmctx.tokenizer import TextTokenizer
from mmctx.train.config import RunConfig
from mmctx.train.loop import train
from mmctx.train.replay import recorded_fingerprint, replay
from mmctx.train.segments import Segment, continue_segments

Change = Callable[[dict[str, Any]], None]


class Reader:
    """A run without its model: the samples that its plans name, stretch after stretch."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.segments: list[Segment] = []
        self.step = 0
        self.read: list[tuple[str, int, int, int]] = []
        self.left_out: list[tuple[str, int]] = []
        self.said: list[str] = []

    def go(self, steps: int, change: Change = lambda tree: None) -> None:
        """`steps` more steps under the tree with this change."""
        tree = json.loads(json.dumps(self.tree))
        change(tree["data"])
        config = build_config(RunConfig, tree, "tree")
        data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
        self.segments = continue_segments(self.segments, self.step, config, data, "run", self.said.append)
        plan = Plan(config.data, data.tables, config.train.seed, self.segments[-1].start)
        for step in range(self.step, self.step + steps):
            for bin in plan.step(step):
                self.read += [(plan.names[n], sample, epoch, part) for n, sample, epoch, part in bin.samples]
                self.left_out += [(plan.names[n], sample) for n, sample, _ in bin.left_out]
        self.step += steps

    def first_epoch(self, source: str) -> set[int]:
        """Samples of a source that were read in its epoch 0."""
        return {sample for name, sample, epoch, _ in self.read if (name, epoch) == (source, 0)}


@pytest.fixture
def reader(tree: dict[str, Any]) -> Reader:
    tree["data"] |= {"bin_tokens": 300, "window_steps": 5, "block_size": 4, "blocks_in_flight": 3, "context_length": 40}
    for source in tree["data"]["sources"].values():
        source |= {"long_documents": "split", "weight": 1.0}
    return Reader(tree)


def set_window(steps: int, bin_tokens: int) -> Change:
    return lambda data: data.update(window_steps=steps, bin_tokens=bin_tokens)


def test_samples_carried_over_survive_a_second_change_before_their_turn(reader: Reader) -> None:
    reader.go(3)
    reader.go(1, set_window(1, 300))  # its one window is smaller than what was carried over
    reader.go(20, set_window(1, 400))
    assert set(reader.segments[1].start.carried) & set(reader.segments[2].start.carried)  # the case meant
    assert max(Counter(reader.read).values()) == 1
    assert reader.first_epoch("books") == set(range(12))
    assert reader.first_epoch("triples") == set(range(48))


def test_a_source_that_comes_back_goes_on_where_it_stopped(reader: Reader) -> None:
    reader.go(3)
    reader.go(3, lambda data: data["sources"].pop("books"))
    reader.go(20)
    assert max(Counter(reader.read).values()) == 1
    assert reader.first_epoch("books") == set(range(12))


def test_parts_that_are_left_behind_are_counted(reader: Reader) -> None:
    """As many as the first plan, undisturbed, would still have read of samples that it began."""
    reader.tree["data"]["context_length"] = 20
    undisturbed = Reader(reader.tree)
    undisturbed.go(5)  # the whole window
    reader.go(2)
    begun = {entry[:3] for entry in reader.read}
    left = [entry for entry in undisturbed.read[len(reader.read) :] if entry[:3] in begun]
    reader.go(1, set_window(5, 400))
    assert left
    assert [line.split()[0] for line in reader.said if "stay unread" in line] == [str(len(left))]


def test_other_blocks_begin_a_new_pass(reader: Reader) -> None:
    """An epoch that went on in another order would read some samples twice and never others."""
    reader.go(2)
    reader.go(20, lambda data: data.update(block_size=6))
    assert max(Counter(reader.read).values()) == 1
    assert "a new pass over all sources begins" in reader.said[-1]


def test_no_sample_vanishes_that_a_step_not_made_would_have_left_out(reader: Reader) -> None:
    def drop(data: dict[str, Any]) -> None:
        data["context_length"] = 21  # too short for almost half of the triples
        for source in data["sources"].values():
            source["long_documents"] = "drop"

    reader.go(1, drop)
    recorded = {sample for name, sample in reader.left_out if name == "triples"}
    reader.go(30)
    assert 0 < len(recorded) < 20
    assert reader.first_epoch("triples") | recorded == set(range(48))


@pytest.mark.slow
def test_a_quarantine_list_may_be_written_anew_where_it_lies(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    tree["data"]["quarantine"] = str(path)
    tree["eval"]["sources"] = {}

    def run(quarantined: int, steps: int) -> Path:
        entries = [
            QuarantineEntry(str(shard.path), shard.content_hash, n, "", "bad_text", "") for n in range(quarantined)
        ]
        write_quarantine(path, entries)
        tree["train"]["steps"] = steps
        return train(build_config(RunConfig, tree, "tree")).run_dir

    triples = tree["data"]["sources"]["triples"]
    shard = index_shards(sorted(glob(triples["shards"])), TextTokenizer(tree["data"]["tokenizer"]), triples["texts"])[0]
    run_dir = run(quarantined=1, steps=4)
    assert run(quarantined=12, steps=6) == run_dir
    for step in (1, 2, 4, 5, 6):
        assert replay(run_dir, step).fingerprint == recorded_fingerprint(run_dir, step)
    moved = run_dir.rename(tmp_path / "moved")
    assert replay(moved, 2).fingerprint == recorded_fingerprint(moved, 2)
    for kept in moved.glob("quarantine-*.jsonl"):
        kept.unlink()
    with pytest.raises(
        CheckpointError, match=r"data\.quarantine=.* lists other samples .* restore that list as .*moved"
    ):
        replay(moved, 2)
