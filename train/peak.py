"""The most memory that PyTorch's CPU allocator held while something ran, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def measure_peak(function: Callable[[], Any]) -> int:
    """Bytes held at the worst moment of `function()`, beyond what was held before.

    Every allocation and release is recorded by PyTorch's profiler, those inside of kernels included, so the number does not depend on when
    the C library returns memory to the system. What libraries such as MKL allocate for themselves is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak
