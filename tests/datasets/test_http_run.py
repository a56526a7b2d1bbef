"""A run over HTTP whose server restarts in the middle reads and learns what a run over local files does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import Nginx

from mmctx.config import build_config
from mmctx.datasets.shards.index import expand_shards
from mmctx.jsonl import read_lines
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

pytest.importorskip("aiohttp", reason="needs the extra `remote`")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, BEFORE = 40, 8
DOWN = 2.0  # seconds without a server


def over_http(tree: dict[str, Any], nginx: Nginx, root: Path, cache: Path) -> dict[str, Any]:
    """The same run over copies of its shards that `nginx` serves; the cache is too small to keep a block."""
    tree = json.loads(json.dumps(tree))
    for name, last in (("triples", 1), ("books", 0)):
        source = tree["data"]["sources"][name]
        for shard in expand_shards(source["shards"]):
            shutil.copy(str(shard), root)
        source["shards"] = f"{nginx.url}/{name}-{{000000..{last:06d}}}.tar"
    tree["data"] |= {"remote_cache_dir": str(cache), "remote_cache_gb": 1e-6, "num_workers": 2, "prefetch": 1}
    tree["run"]["name"] = "far"
    return tree


def wait_for_steps(process: subprocess.Popen, run_dir: Path, count: int) -> int:
    """Until `metrics.jsonl` holds `count` lines; returns how many it holds."""
    deadline = time.monotonic() + 200
    while True:
        found = len(read_lines(run_dir / "metrics.jsonl")) if (run_dir / "metrics.jsonl").exists() else 0
        if found >= count:
            return found
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{found} steps, expected {count}: {process.communicate()[1][-3000:]}")
        time.sleep(0.02)


def test_a_restart_of_the_server_changes_nothing(
    tree: dict[str, Any], nginx: Nginx, root: Path, tmp_path: Path
) -> None:
    tree["train"] |= {"steps": STEPS, "log_every": 1, "save_every": STEPS}
    tree["eval"]["sources"] = {}
    tree["run"]["name"] = "near"
    near = train(build_config(RunConfig, tree, "tree")).run_dir
    far = Path(tree["run"]["dir"]) / "far"
    config = tmp_path / "far.yaml"
    config.write_text(yaml.safe_dump(over_http(tree, nginx, root, tmp_path / "blocks")))
    process = subprocess.Popen(
        [sys.executable, "-m", "mmctx.train", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for_steps(process, far, BEFORE)
        nginx.stop()
        at_hand = len(read_lines(far / "metrics.jsonl")) + 3  # the step at work, and what two workers hold ready
        assert nginx.requests()
        nginx.forget()
        time.sleep(DOWN)
        stalled = len(read_lines(far / "metrics.jsonl"))
        assert process.poll() is None
        nginx.start()
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert stalled <= at_hand < STEPS  # it waited, in its middle
    assert "trying again" in errors
    after = [request for request in nginx.requests() if request.status == 206]
    assert {request.uri for request in after} == {f"/{path.name}" for path in root.iterdir()}
    lines, expected = (read_lines(run_dir / "metrics.jsonl") for run_dir in (far, near))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["batch_fingerprint"] for line in lines] == [line["batch_fingerprint"] for line in expected]
    assert len({line["batch_fingerprint"] for line in lines}) == STEPS
    assert lines[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)
    assert not any(line["skipped"] for line in lines)
