"""One trial: a run of its own in a process of its own, watched by its metrics.jsonl."""

from __future__ import annotations

import fcntl
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmctx.errors import ConfigError, DataError
from mmctx.eval import headlines
from mmctx.eval.results import read_results
from mmctx.jsonl import read_lines

_LOOK_EVERY = 0.5  # seconds between looks at metrics.jsonl
_LOCK, _LOG, CONFIG = "trial.lock", "trial.log", "trial.yaml"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        value: of the metric at its last step; None where it failed.
        pruned: given up on the way.
        problem: what went wrong, for people; None if nothing did.
    """

    value: float | None
    pruned: bool = False
    problem: str | None = None


def hold(path: Path) -> IO[str]:
    """A file with a lock that the system gives up when all that hold it have died, however they died."""
    lock = path.open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of a file."""
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def run_trial(
    folder: Path,
    lock: IO[str],
    launch: Sequence[str],
    metric: str,
    is_hopeless: Callable[[int, float], bool],
    reported: int = -1,
) -> Outcome:
    """Runs `folder/trial.yaml` to its end, or goes on where an earlier sitting stopped.

    Args:
        folder: of the trial, which is also its run's folder.
        lock: of the folder; the run's process holds it, too, so that it stays locked as long as either of the two lives.
        launch: what starts its processes; empty for one process of this Python.
        metric: a name in metrics.jsonl.
        is_hopeless: asked with (step, value) for each new value, whether to give up.
        reported: step up to which earlier sittings asked.

    Raises:
        ConfigError: the run has no such metric, or `launch` names no program.
        KeyboardInterrupt: the run was stopped by a signal; it can go on.
    """
    command = [*(launch or [sys.executable]), "-m", "mmctx.train", str(folder / CONFIG)]
    pruned = False
    with (folder / _LOG).open("ab") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
        except OSError as error:
            raise ConfigError(
                f"launch: {command[0]!r} cannot be started: {error}; name a program, or leave launch out"
            ) from None
        try:
            while process.poll() is None:
                time.sleep(_LOOK_EVERY)
                for step, value in [] if pruned else values(folder, metric, reported):
                    reported, pruned = step, is_hopeless(step, value)
                    if pruned:
                        process.send_signal(signal.SIGTERM)  # it saves and ends
                        break
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if pruned:
        return Outcome(last_value(folder, metric), pruned=True)
    return _outcome(folder, metric, process.returncode, shlex.join(command))


def _outcome(folder: Path, metric: str, code: int, command: str) -> Outcome:
    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        tail = "\n".join((folder / _LOG).read_text(errors="replace").splitlines()[-15:])
        return Outcome(None, problem=f"`{command}` ended with {code}:\n{tail}")
    value = last_value(folder, metric)
    if value is None:
        known = {name for line in read_lines(folder / "metrics.jsonl") for name in line} | set(_results(folder))
        raise ConfigError(f"metric: the run has no {metric!r}; it has {', '.join(sorted(known))}")
    return Outcome(value)


def has_run(folder: Path) -> bool:
    """Whether the trial came to start its run."""
    return (folder / _LOG).exists()


def lock_of(folder: Path) -> Path:
    """The file whose lock says that somebody works on the trial."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / _LOCK


def values(folder: Path, metric: str, after: int = -1) -> list[tuple[int, float]]:
    """(step, value) of the lines of metrics.jsonl that hold the metric, those after a step alone."""
    lines = read_lines(folder / "metrics.jsonl")
    return [(line["step"], line[metric]) for line in lines if line.get(metric) is not None and line["step"] > after]


def last_value(folder: Path, metric: str) -> float | None:
    """The newest value, of the evaluation at the end if it holds the metric; None where there is none."""
    if (found := _results(folder).get(metric)) is not None:
        return found
    lines = values(folder, metric)
    return lines[-1][1] if lines else None


def _results(folder: Path) -> dict[str, float]:
    """Headlines of the newest evaluation, named as in metrics.jsonl."""
    try:
        entries = read_results(folder)
    except DataError:
        return {}
    suites = headlines(entries[-1]) if entries else {}
    return {f"eval/{suite}/{name}": value for suite, numbers in suites.items() for name, value in numbers.items()}
