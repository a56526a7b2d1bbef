"""What "auto" goes by: the certificate of this machine, or what a run has settled on for all its ranks.

with using(choice):   # one choice for everything inside, whatever certificates the ranks' hosts hold
    ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from mmctx.attention.backend import Request

STATIC = "the static order: this machine has no certificate, `mmctx doctor` makes one"


@dataclass(frozen=True, slots=True)
class Crossover:
    """From which length on dense attention serves a document faster than a variable-length kernel.

    Attributes:
        short: the backend that serves shorter documents.
        causal: tokens, None where dense attention is never faster.
        bidirectional: the same for documents that attend in both directions.
    """

    short: str
    causal: int | None
    bidirectional: int | None

    def is_long(self, length: int, causal: bool) -> bool:
        """Whether a document of `length` tokens is at or beyond the crossover."""
        limit = self.causal if causal else self.bidirectional
        return limit is not None and length >= limit


@dataclass(frozen=True, slots=True, eq=False)  # told apart by identity: cheap as a key of a cache
class Choice:
    """In which order "auto" tries the backends, and which it leaves alone.

    Attributes:
        times: (backend, type, windowed, milliseconds) of those that passed certification.
        failed: backends that gave wrong numbers or raised.
        unsteady: backends that gave other bits from one backward pass to the next.
        crossover: of the hybrid backend, None where it was not measured.
        allowed: backends that every rank of the run can use, None without such a limit.
        source: where all this is from, for people.
    """

    times: tuple[tuple[str, str, bool, float], ...] = ()
    failed: frozenset[str] = frozenset()
    unsteady: frozenset[str] = frozenset()
    crossover: Crossover | None = None
    allowed: frozenset[str] | None = None
    source: str = STATIC

    def why_not(self, name: str, request: Request) -> str | None:
        """Why "auto" must not take a backend although it says that it can serve the request, or None."""
        if name in self.failed:
            return f"it failed certification ({self.source})"
        if request.deterministic and name in self.unsteady:
            return f"its backward pass gave different bits in two runs ({self.source})"
        if self.allowed is not None and name not in self.allowed:
            return "not every rank of this run can use it"
        return None

    def ordered(self, names: Sequence[str], request: Request) -> list[str]:
        """`names`, the fastest for such a request first; those that were not timed follow in their own order."""
        dtype = str(request.dtype).removeprefix("torch.")
        times = {name: ms for name, of, windowed, ms in self.times if (of, windowed) == (dtype, request.windowed)}
        return sorted(names, key=lambda name: times.get(name, math.inf))


_in_use: Choice | None = None


def choice_in_use() -> Choice | None:
    """What `using` holds, None outside of it."""
    return _in_use


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Everything inside goes by `choice` instead of the machine's certificate."""
    global _in_use
    before, _in_use = _in_use, choice
    try:
        yield
    finally:
        _in_use = before


def current_choice(device: torch.device) -> Choice:
    """What `using` holds, or else what the machine's certificate says of `device`."""
    return _in_use or certified_choice(device)


@lru_cache
def certified_choice(device: torch.device) -> Choice:
    """What the machine's certificate says, read once; the static order where there is none that fits."""
    from mmctx.attention.record import load_record

    record = load_record(device)
    return Choice() if record is None else record.choice()
