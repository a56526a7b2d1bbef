"""Where the time of a step goes: a few steps of a run under PyTorch's profiler. What `mmctx profile` does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from mmctx.model import MmctxModel
from mmctx.ranges import PREFIX, timed

STEP, BACKWARD = "step", "backward"
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


def parts_of(model: MmctxModel) -> dict[str, list[nn.Module]]:
    """Modules whose forward passes are told apart. What a block does outside of its norms and MLP is attention with its projections."""
    trunk, blocks = model.trunk, list(model.trunk.blocks)
    norms = [module for block in blocks for name, module in block.named_modules() if name.endswith("norm")]
    compiled = any(block.compiler for block in blocks)  # what is inside cannot be told apart
    return {
        **{f"{kind} encoder": [encoder] for kind, encoder in model.encoders.items()},
        "trunk: blocks" if compiled else "trunk: attention": blocks,
        **({} if compiled else {"trunk: MLP": [block.mlp for block in blocks]}),  # type: ignore[dict-item]
        "trunk: norms": [trunk.norm] if compiled else [*norms, trunk.norm],
        **{f"loss of {name}": [objective] for name, objective in model.objectives.items()},
    }


@contextmanager
def ranges_on(model: MmctxModel) -> Iterator[None]:
    """While it lasts, forward passes of `parts_of` are ranges for the profiler."""
    open_ranges: list[Any] = []

    def enter(part: str, module: nn.Module, args: Any) -> None:
        open_ranges.append(timed(part))
        open_ranges[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = []
    for part, modules in parts_of(model).items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(partial(enter, part)))
            hooks.append(module.register_forward_hook(leave))
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
