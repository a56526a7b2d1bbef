"""The first promise: the global batch of step N does not depend on ranks, workers, kills or changes made on the way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import damaged

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.errors import CheckpointError, ConfigError
from mmctx.jsonl import read_lines
from mmctx.train.checkpoints.layout import list_checkpoints
from mmctx.train.config import RunConfig
from mmctx.train.loop import train
from mmctx.train.replay import recorded_fingerprint, replay
from mmctx.train.segments import Segment, continue_segments, open_segment, segment_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 30


@pytest.fixture
def elastic(tree: dict[str, Any]) -> dict[str, Any]:
    """Two weighted sources, triples and interleaved documents, four bins a step: 1, 2 and 4 ranks can share them out."""
    tree["data"] |= {"bins_per_step": 4, "bin_tokens": 300, "window_steps": 5, "block_size": 4, "blocks_in_flight": 3}
    tree["data"]["sources"]["triples"]["weight"] = 0.7
    tree["data"]["sources"]["books"] |= {"weight": 0.3, "long_documents": "split"}
    tree["data"]["context_length"] = 40
    tree["data"]["sources"]["triples"]["long_documents"] = "truncate"
    tree["train"] |= {"steps": STEPS, "log_every": 1, "save_every": 3, "keep": {"last": 100}}
    tree["eval"]["sources"] = {}
    return tree


def config_of(tree: dict[str, Any], name: str, **data: Any) -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["data"] |= data
    return build_config(RunConfig, tree, "tree")


def fingerprints(run_dir: Path) -> dict[int, str]:
    return {line["step"]: line["batch_fingerprint"] for line in read_lines(run_dir / "metrics.jsonl")}


def launch(tree: dict[str, Any], folder: Path, name: str, ranks: int, workers: int) -> subprocess.Popen:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["data"]["num_workers"] = workers
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "mmctx.train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def kill_after(process: subprocess.Popen, run_dir: Path, step: int) -> int:
    """SIGKILL to every process of the run once the checkpoint of `step` is there; returns the newest step that was saved whole."""
    deadline = time.monotonic() + 400
    while not (run_dir / f"checkpoint-{step}").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"no checkpoint of step {step}: {process.communicate()[1][-3000:]}")
        time.sleep(0.02)
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:  # ranks and loader workers are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    return int(list_checkpoints(run_dir)[-1].name.removeprefix("checkpoint-"))


def ledger(run_dir: Path) -> set[tuple[int, str, str]]:
    """(step, key, reason) of all ranks."""
    return {
        (line["step"], line["key"], line["reason"])
        for path in run_dir.glob("skips*.jsonl")
        for line in read_lines(path)
    }


def test_any_ranks_and_workers_read_the_same_global_batches(
    elastic: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    """Saved at 2 ranks x 2 workers and killed, resumed at 1 x 0 and killed, then 4 x 1, and (from the first save again) 2 x 3.

    One picture cannot be decoded: it is skipped at the same steps everywhere.
    """
    elastic = damaged(elastic, corpus, tmp_path / "corpus")
    elastic["data"]["skip_budget"] = 0.5
    whole = train(config_of(elastic, "whole")).run_dir
    expected = fingerprints(whole)
    assert list(expected) == list(range(1, STEPS + 1))
    assert len(set(expected.values())) == STEPS
    assert {("triple0003", "undecodable_image")} <= {entry[1:] for entry in ledger(whole)}
    run_dir = Path(elastic["run"]["dir"]) / "elastic"
    first = kill_after(launch(elastic, tmp_path, "elastic", ranks=2, workers=2), run_dir, 6)
    second = kill_after(launch(elastic, tmp_path, "elastic", ranks=1, workers=0), run_dir, first + 3)
    assert 6 <= first < second < STEPS
    for ranks, workers in ((4, 1), (2, 3)):
        process = launch(elastic, tmp_path, "elastic", ranks, workers)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors[-3000:]
        assert fingerprints(run_dir) == expected
        assert ledger(run_dir) == ledger(whole)
        for checkpoint in list_checkpoints(run_dir)[2:]:  # set the run back to where the first sitting stood
            (checkpoint / "COMPLETE").unlink()
    losses = [[line["loss"] for line in read_lines(d / "metrics.jsonl")] for d in (whole, run_dir)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_replay_rebuilds_what_a_run_read(elastic: dict[str, Any], tmp_path: Path) -> None:
    run_dir = train(config_of(elastic, "replayed", num_workers=2)).run_dir
    for step in (1, 7, STEPS):
        assert replay(run_dir, step).fingerprint == recorded_fingerprint(run_dir, step) == fingerprints(run_dir)[step]
    path = tmp_path / "replayed.yaml"
    path.write_text(yaml.safe_dump(elastic))
    assert replay(path, 7).fingerprint == fingerprints(run_dir)[7]
    assert replay(path, 7, ("train.seed=9",)).fingerprint != fingerprints(run_dir)[7]


def test_replay_says_what_it_cannot_do(elastic: dict[str, Any], tmp_path: Path, capfd) -> None:
    elastic["train"]["steps"] = 2
    run_dir = train(config_of(elastic, "asked")).run_dir
    with pytest.raises(ConfigError, match=r"nope: neither a run folder nor"):
        replay(tmp_path / "nope", 1)
    with pytest.raises(ConfigError, match=r"'data.bin_tokens=9' would change it"):
        replay(run_dir, 1, ("data.bin_tokens=9",))
    assert replay(run_dir, 1, ("data.num_workers=1",)).fingerprint == fingerprints(run_dir)[1]
    elastic["train"]["steps"] = 1
    assert train(config_of(elastic, "asked")).step == 2
    assert "is at step 2 already: raise train.steps=1" in capfd.readouterr().err


def samples_read(run_dir: Path, steps: range) -> list[tuple[str, int, int]]:
    found = []
    for step in steps:
        batch = replay(run_dir, step)
        names = list(batch.data.tables)
        found += [
            (names[source], sample, epoch)
            for bin in batch.bins
            for source, sample, epoch, part in bin.samples
            if part == 0
        ]
    return found


def test_a_change_of_mix_or_context_is_a_new_segment_of_the_run(elastic: dict[str, Any], capfd) -> None:
    elastic["train"]["steps"] = 8
    run_dir = train(config_of(elastic, "changed")).run_dir
    before = fingerprints(run_dir)
    elastic["train"]["steps"] = 16
    elastic["data"]["sources"]["books"]["weight"] = 2.0
    elastic["data"]["context_length"] = 60
    assert train(config_of(elastic, "changed")).step == 16
    told = capfd.readouterr().err
    assert "a new segment of the plan begins at step 8" in told
    assert "data.sources.books.weight: 0.3 -> 2.0" in told
    assert "data.context_length: 40 -> 60" in told
    after = fingerprints(run_dir)
    assert {step: after[step] for step in before} == before
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["segment"] for line in lines] == [0] * 8 + [1] * 8
    assert all(replay(run_dir, step).fingerprint == after[step] for step in (3, 8, 9, 16))
    counts = samples_read(run_dir, range(1, 17))
    assert len(counts) == len(set(counts))  # no epoch of a source was begun anew, none read a sample twice
    first_epoch = {sample for name, sample, epoch in counts if (name, epoch) == ("books", 0)}
    assert first_epoch == set(range(12))


def test_other_shards_under_a_known_name_are_refused(elastic: dict[str, Any], corpus: Path) -> None:
    elastic["train"]["steps"] = 2
    train(config_of(elastic, "swapped"))
    elastic["data"]["sources"]["books"]["shards"] = str(corpus / "heldout-*.tar")
    elastic["train"]["steps"] = 4
    with pytest.raises(CheckpointError, match=r"data\.sources\.books: its shards have fingerprint \w+, in .* \w+"):
        train(config_of(elastic, "swapped"))


def test_changes_in_quick_succession_lose_and_repeat_nothing(elastic: dict[str, Any]) -> None:
    """The second comes while samples that the first carried over still wait for later windows."""
    elastic["data"] |= {"bins_per_step": 4, "bin_tokens": 600, "window_steps": 4, "context_length": 128}
    stages = [
        (0, {}),
        (1, {"bin_tokens": 200, "window_steps": 1, "bins_per_step": 1}),
        (3, {"bin_tokens": 500, "bins_per_step": 2}),
    ]
    segments: list[Segment] = []
    for step, changes in stages:
        config = config_of(elastic, "quick", **{**elastic["data"], **changes})
        data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
        segments = continue_segments(segments, step, config, data, "here", lambda text: None)
    assert [segment.start.step for segment in segments] == [0, 1, 3]
    assert len(segments[2].start.carried) > 20
    found: Counter[tuple[str, int, int]] = Counter()
    for step in range(60):
        data, plan = open_segment(segment_of(segments, step), config)
        found.update(
            (plan.names[s], sample, epoch)
            for bin in plan.step(step)
            for s, sample, epoch, part in bin.samples
            if part == 0
        )
    assert max(found.values()) == 1
    for name, size in (("triples", 48), ("books", 12)):
        for epoch in (0, 1, 2):
            assert {sample for source, sample, e in found if (source, e) == (name, epoch)} == set(range(size))
