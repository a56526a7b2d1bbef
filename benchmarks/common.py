"""What the benchmarks share: photo-like data, interleaved timing, environments for peers, printing. Not a benchmark itself."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(os.environ.get("MMCTX_BENCH", Path(__file__).resolve().parent.parent / ".bench"))
"""Environments of peers, or where MMCTX_BENCH says; safe to delete."""

_WORDS = "a the red small old two of over near quiet dog bridge river lamp garden street window boat hill cup"


def parse(description: str | None, repeats: int) -> argparse.Namespace:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser.parse_args()


def interleaved(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times in turns, so that a busy moment of the machine hits all sides alike.

    A side returns its own seconds, so that it can leave its preparations out.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(run())
    return times


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """The function as a side of `interleaved`: its result is dropped, its seconds are returned."""

    @functools.wraps(function)
    def run() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return run


def both_clocks(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call, by the clock and by the processor."""
    started = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def best_in_turns(
    sides: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 0
) -> dict[str, dict[str, float]]:
    """The least seconds of every side by `clock` and by `processor`, over `repeats` turns after some that are not counted."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, run in sides.items():
            seconds = both_clocks(run)
            if turn >= warm_up:
                turns[name].append(seconds)
    return {
        name: dict(zip(("clock", "processor"), map(min, zip(*found, strict=True)), strict=True))
        for name, found in turns.items()
    }


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times faster we are: by the best of each side, and the median over the turns."""
    by_turn = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"best": round(min(theirs) / min(ours), 3), "median": round(statistics.median(by_turn), 3)}


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions."""
    return {name: version(name) for name in names}


def report(result: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """One JSON object, or lines to read."""
    print(json.dumps(result) if as_json else "\n".join(lines))


def photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A JPEG of quality 90 that costs what a photograph costs: smooth fields, edges, writing and fine grain."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    field = np.zeros((height, width, 3), np.float32)
    for cells in (3, 8, 24, 80):  # from sky to foliage, each octave weaker
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        field += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / cells**0.6
    field += rng.normal(0, 3, (height, width, 1))
    field -= field.min()
    picture = Image.fromarray((field * (255 / field.max())).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y, w, h = rng.integers(0, (width, height, width // 3, height // 3)).tolist()
        draw.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
        draw.text((y, x // 2), caption(rng), fill=(255, 255, 255))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def caption(rng: np.random.Generator) -> str:
    """Eight to sixteen words."""
    return " ".join(rng.choice(_WORDS.split(), rng.integers(8, 17)))


def write_photos(folder: Path, count: int, shards: int = 1, different: int = 200) -> list[Path]:
    """Shards of `count` samples in all: ``jpg`` and ``txt``. Pictures repeat after `different`, captions do not."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    pictures = [photo(seed) for seed in range(min(different, count))]
    rng = np.random.default_rng(0)
    paths = [folder / f"photos-{number:04d}.tar" for number in range(shards)]
    for number, path in enumerate(paths):
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for index in range(number * count // shards, (number + 1) * count // shards):
                picture = pictures[index % len(pictures)]
                writer.write({"__key__": f"{index:08d}", "jpg": picture, "txt": caption(rng).encode()})
    return paths


def peer_python(name: str, requirements: Sequence[str], needs: str) -> Path:
    """The interpreter of a small environment under `.bench`, made at the first call.

    It sees the packages of this environment and puts `requirements` before them: nothing of ours is up- or downgraded,
    and torch is not installed again.

    Args:
        name: of the folder.
        requirements: for pip.
        needs: a module that must import there.

    Raises:
        RuntimeError: pip fails, for instance without network.
    """
    python = CACHE / name / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", f"import {needs}"], capture_output=True).returncode:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", CACHE / name], check=True)
    site = next((CACHE / name / "lib").glob("python*/site-packages"))
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_main_environment.pth").write_text("\n".join(ours) + "\n")
    for command in (["-m", "pip", "install", "--quiet", *requirements], ["-c", f"import {needs}"]):
        done = subprocess.run([python, *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {' '.join(command)} failed: {done.stderr.strip()[-400:]}")
    return python


def run_peer(python: Path, script: Path, *arguments: str) -> dict[str, Any]:
    """Runs a script in a peer's environment; its last line of output is JSON.

    Raises:
        RuntimeError: the script fails.
    """
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)}: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])
