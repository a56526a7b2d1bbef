"""A parent that forks runs and kills them: importing and indexing happen once, dying happens often.

    python tests/train/kill_worker.py TREE.json OUT.json KILLS SECONDS

Each child is a process of its own that trains the run of the tree from its newest checkpoint. SIGKILL comes at a random instant, after so
many seconds of training on average; at the latest when the child has written one checkpoint more, so that a machine that is faster by then
leaves something to kill. Every third kill waits for that checkpoint and comes while the next one is written.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmctx.config import build_config
from mmctx.errors import CheckpointError
from mmctx.jsonl import read_lines
from mmctx.train.build import build_model
from mmctx.train.checkpoints.layout import final_path, list_checkpoints, newest_whole, step_of
from mmctx.train.checkpoints.manifest import verify
from mmctx.train.config import RunConfig
from mmctx.train.course import build_course
from mmctx.train.loop import train


def fork(config: RunConfig, log: Path) -> int:
    """A child that trains to the end; its process id."""
    log.write_text("")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
            train(config)
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


def wait(pid: int, ready: Callable[[], bool], seconds: float = 100) -> None:
    """Until the child is where it is wanted, has ended, or so much time has passed."""
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def half_written(run_dir: Path) -> int:
    """Step of the checkpoint that is being written, 0 for none."""
    return max((int(path.name.rpartition("-")[2]) for path in run_dir.glob(".partial-checkpoint-*")), default=0)


def newest(run_dir: Path) -> int:
    """Step of the newest whole checkpoint, 0 for none."""
    checkpoint = newest_whole(run_dir)
    return step_of(checkpoint) if checkpoint else 0


def resumed_at(log: Path) -> int:
    """The step that a child said it went on from; -1 if it was killed before, 0 if it began anew."""
    text = log.read_text()
    if found := re.search(r"resuming .* at step (\d+) of", text):
        return int(found.group(1))
    return 0 if " parameters, " in text else -1


def state_of(run_dir: Path) -> dict[str, Any]:
    """What a kill left: whole checkpoints, and what is half done. A folder with COMPLETE must be whole, whenever the kill came."""
    complete = list_checkpoints(run_dir)
    damaged = []
    for checkpoint in complete:
        try:
            verify(checkpoint)
        except CheckpointError as error:
            damaged.append(str(error))
    halves = [path.name for path in run_dir.glob(".partial-checkpoint-*")]
    halves += [path.name for path in run_dir.glob("checkpoint-*") if path not in complete]
    return {"whole": [step_of(path) for path in complete], "damaged": damaged, "halves": halves}


def main(tree_path: str, out: str, kills: str, seconds: str) -> None:
    """Kills a run again and again, then lets it end."""
    torch.set_num_threads(1)
    tree = json.loads(Path(tree_path).read_text())
    config = build_config(RunConfig, tree, tree_path)
    course = build_course(config, 0, 1)  # indexes shards, and imports what children need
    build_model(config, len(course[0].tokenizer))
    run_dir = Path(config.run.dir) / config.run.name
    log, rng, found = Path(out).with_suffix(".log"), random.Random(7), []
    for kill in range(int(kills)):
        before = newest(run_dir)
        pid = fork(config, log)
        delay = 2 * rng.random() * float(seconds)
        if kill % 3 == 0:
            wait(pid, lambda before=before: half_written(run_dir) > before + 1)
            time.sleep(rng.random() * 0.004)
        elif kill % 4:
            wait(pid, lambda: resumed_at(log) >= 0)
            wait(pid, lambda before=before: final_path(run_dir, before + 1).exists(), delay)
        else:  # while it opens the run
            time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        found.append({"before": before, "resumed": resumed_at(log), "status": status, **state_of(run_dir)})
    before = newest(run_dir)
    pid = fork(config, log)
    _, status = os.waitpid(pid, 0)
    answer = {
        "kills": found,
        "end": {"before": before, "resumed": resumed_at(log), "status": status, **state_of(run_dir)},
        "steps": [line["step"] for line in read_lines(run_dir / "metrics.jsonl")],
        "log": log.read_text()[-2000:],
    }
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
