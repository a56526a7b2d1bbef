"""A loader process that hangs or dies is named, with what it was reading."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.plan import Plan
from mmctx.datasets.workers import WatchedLoader
from mmctx.errors import DataError
from mmctx.train.config import RunConfig


@pytest.fixture
def stuck(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> RunData:
    """Data of which one shard is on a storage that does not answer: a pipe into which nobody writes."""
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    for source in tree["data"]["sources"].values():
        source["shards"] = source["shards"].replace(str(corpus), str(copy))
    tree["data"] |= {"num_workers": 2, "worker_timeout": 1.5}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    shard = copy / "books-000000.tar"
    shard.unlink()
    os.mkfifo(shard)
    return data


def loader_of(data: RunData) -> WatchedLoader:
    loader = make_loader(data.dataset, StepSampler(Plan(data.config, data.tables, 0), 0, 50), data.config)
    assert isinstance(loader, WatchedLoader)
    return loader


def test_a_stalled_worker_is_named_with_the_sample_and_its_shard(stuck: RunData) -> None:
    began = time.monotonic()
    with pytest.raises(DataError) as error:
        for _ in loader_of(stuck):
            pass
    message = str(error.value)
    assert "loader worker " in message
    assert "was reading sample 'book00" in message
    assert f"of source 'books' in {stuck.tables['books'].source.shards[0].path}" in message
    assert "no batch within data.worker_timeout=1.5 s: look at the storage, or raise it" in message
    assert time.monotonic() - began < 20


def test_a_worker_that_dies_is_named_too(stuck: RunData) -> None:
    """Killed as the kernel does when memory runs out, while it reads."""
    stuck = RunData(
        stuck.config.model_copy(update={"worker_timeout": None}), stuck.tokenizer, stuck.dataset, stuck.quarantine
    )
    loader = loader_of(stuck)
    killer = threading.Thread(target=kill_who_reads, args=(loader, list(stuck.tables).index("books")))
    killer.start()
    with pytest.raises(DataError) as error:
        for _ in loader:
            pass
    killer.join()
    assert "loader worker " in str(error.value)
    assert "was reading sample 'book00" in str(error.value)
    assert "it died: look for lack of memory" in str(error.value)


def kill_who_reads(loader: WatchedLoader, source: int) -> None:
    while True:
        for worker in (0, 1):
            pid, reading, *_ = loader.board.read(worker)
            if reading == source:
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.02)


def test_errors_of_samples_come_through_as_they_are(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    for source in tree["data"]["sources"].values():
        source["shards"] = source["shards"].replace(str(corpus), str(copy))
    tree["data"]["num_workers"] = 1
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    os.truncate(copy / "books-000000.tar", 1024)
    with pytest.raises(DataError, match=r"books-000000\.tar: offset \d+: sample 'book"):
        list(loader_of(data))


@pytest.mark.slow
def test_workers_end_with_the_iterator_and_with_the_process(tree: dict[str, Any], tmp_path: Path) -> None:
    """They ignore SIGTERM, by which multiprocessing would end them."""
    tree["data"]["num_workers"] = 2
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    others = multiprocessing.active_children()
    batches = iter(loader_of(data))
    next(batches)
    assert len(multiprocessing.active_children()) == len(others) + 2
    began = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == others
    assert time.monotonic() - began < 5
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    code = f"""
import mmctx
from mmctx.datasets.fetch import StepSampler, make_loader
from mmctx.datasets.planning.plan import Plan
data = mmctx.build_dataset(mmctx.load_config({str(path)!r}))
batches = iter(make_loader(data.dataset, StepSampler(Plan(data.config, data.tables, 0), 0, 50), data.config))
next(batches)
raise RuntimeError("a script that breaks")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "a script that breaks" in done.stderr
