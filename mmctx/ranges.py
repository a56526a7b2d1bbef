"""Names for parts of a training step, seen by PyTorch's profiler and by nobody else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

PREFIX = "mmctx/"
"""Every range's name begins so."""

_NOTHING = nullcontext()


def timed(part: str) -> AbstractContextManager[object]:
    """A range of this name while a profiler records, else a context that does nothing: one look at a flag.

    Not for use inside of what is compiled.
    """
    return profiler.record_function(PREFIX + part) if profiler._is_profiler_enabled else _NOTHING
