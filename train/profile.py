"""Where the time of a step goes: a few steps of a run under PyTorch's profiler. What `mmctx profile` does."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from mmctx.determinism import deterministic_algorithms
from mmctx.errors import ConfigError
from mmctx.eval.config import EvalConfig
from mmctx.model import MmctxModel
from mmctx.ranges import PREFIX, timed
from mmctx.train.config import RunConfig
from mmctx.train.loop import sitting

STEP, BACKWARD = "step", "backward"
WARM_UP = 2
_OTHER = "other"
_AGAIN = " (again)"  # computed once more in the backward pass


@dataclass(frozen=True)
class Part:
    """One row: what a part of the step took, apart from the parts inside of it, on average over the steps.

    Attributes:
        part: its name.
        host_ms: on the host, waiting included.
        device_ms: of kernels on the GPU; None without one.
        share: of all, on the device if there is one.
    """

    part: str
    host_ms: float
    device_ms: float | None
    share: float


def profile_run(config: RunConfig, steps: int, out: Path, stage: int = 1) -> dict[str, Any]:
    """Takes a few steps of a run on fresh weights, in a folder that is thrown away, and measures the last of them.

    Args:
        config: of the run.
        steps: that are measured, after some that warm up.
        out: folder for `trace.json`, which chrome://tracing and https://ui.perfetto.dev show.
        stage: of `schedule`, from 1.

    Returns:
        `steps`, `step_ms`, `clock` (host or device, which `share` is of), `parts` (see `Part`), `trace`.

    Raises:
        ConfigError: there is no such stage.
    """
    if not 1 <= stage <= len(config.stages):
        raise ConfigError(f"--stage {stage}: the run has {len(config.stages)} stages, counted from 1")
    activities, cuda = [ProfilerActivity.CPU], torch.cuda.is_available()
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    out.mkdir(parents=True, exist_ok=True)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    with TemporaryDirectory() as folder:
        alone = _thrown_away(config.stages[stage - 1].config, Path(folder), WARM_UP + steps)
        with deterministic_algorithms(alone.train.deterministic), sitting(alone) as run:
            run.take(WARM_UP)
            with norms_apart(run.raw_model), profile(activities=activities, acc_events=True) as recorded:
                started = time.perf_counter()
                run.take(steps)
                if cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - started
    parts = break_down(recorded.events() or [], steps, cuda)
    recorded.export_chrome_trace(str(out / "trace.json"))
    return {
        "steps": steps,
        "step_ms": 1e3 * seconds / steps,
        "clock": "device" if cuda else "host",
        "parts": [asdict(part) for part in parts],
        "trace": str(out / "trace.json"),
    }


def _thrown_away(config: RunConfig, folder: Path, steps: int) -> RunConfig:
    train = config.train.model_copy(update={"steps": steps, "trackers": (), "audit": False})
    run = config.run.model_copy(update={"dir": str(folder)})
    return config.model_copy(update={"run": run, "train": train, "eval": EvalConfig()})


@contextmanager
def norms_apart(model: MmctxModel) -> Iterator[None]:
    """While it lasts, the trunk's norms are ranges of their own; those of compiled blocks cannot be."""
    compiled = any(block.compiler for block in model.trunk.blocks)
    inside = [] if compiled else [m for name, m in model.trunk.blocks.named_modules() if name.endswith("norm")]
    open_ranges: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        open_ranges.append(timed("trunk: norms"))
        open_ranges[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = []
    for norm in (*inside, model.trunk.norm):
        hooks += [norm.register_forward_pre_hook(enter), norm.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def break_down(events: Iterable[Any], steps: int, cuda: bool) -> list[Part]:
    """The table, from the profiler's events (`FunctionEvent`): each range's own time, without that of the ranges inside.

    Kernels of the backward pass are launched by a thread of their own: on a GPU, `backward` is what no range launched.
    """
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    kernels = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        kernels += event.self_device_time_total
        if not event.name.startswith(PREFIX):
            continue
        around = list(_ranges_around(event))
        name = _name(event, around)
        host[name] += event.cpu_time_total
        device[name] += event.device_time_total
        if around:
            outer = _name(around[0], around[1:])
            host[outer] -= event.cpu_time_total
            device[outer] -= event.device_time_total
    if cuda:
        device[BACKWARD] += kernels - sum(device.values())
    clock = device if cuda else host
    total = max(sum(clock.values()), 1e-9)
    rows = [
        Part(name, host[name] / steps / 1e3, device[name] / steps / 1e3 if cuda else None, clock[name] / total)
        for name in host
    ]
    return sorted(rows, key=lambda row: -row.share)


def _ranges_around(event: Any) -> Iterator[Any]:
    """The ranges that this one lies in, from the inside out."""
    outer = event.cpu_parent
    while outer is not None:
        if outer.name.startswith(PREFIX):
            yield outer
        outer = outer.cpu_parent


def _name(event: Any, around: list[Any]) -> str:
    name = event.name.removeprefix(PREFIX)
    if name == STEP:
        return _OTHER
    outside = [outer.name.removeprefix(PREFIX) for outer in around]
    again = BACKWARD in outside or STEP not in outside
    return name + _AGAIN if again and name != BACKWARD else name
