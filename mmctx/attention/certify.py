"""Certifies the attention backends on this machine against a dense float64 reference; what `mmctx doctor` runs.

    report = certify()
    best = choose(report.certificates)
    save_record(report.record(), report.device)

The record is what `auto` goes by in later runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mmctx.attention import BACKENDS
from mmctx.attention.backend import Backend, Request
from mmctx.attention.cases import CASES, TOLERANCES, CaseResult, make_inputs, run_case, with_gradients
from mmctx.attention.choice import Choice, Crossover, using
from mmctx.attention.hybrid import HYBRID, LONG, SHORT, make_hybrid
from mmctx.attention.record import CrossoverEntry, Entry, Record, describe_machine, utc_now
from mmctx.attention.timing import measure_crossover, time_backend
from mmctx.determinism import deterministic_algorithms
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

Progress = Callable[[str, int, int], None]

_ERRORS = ("forward", "grad_q", "grad_k", "grad_v")
_HEAD_DIM = 64
_BACKWARD_RUNS = 4
_TRIAL_LENGTH = 32  # in the cases, documents from this length on count as long: both ways of the hybrid are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was found about one backend with one type.

    Attributes:
        backend: its name.
        device: such as "cpu" or "cuda:0".
        dtype: such as "bfloat16".
        usable: the backend says that it can run here, so "auto" may take it.
        why_not: why it cannot, or, of a usable one, what it raised; None where it ran.
        tolerance: the largest relative error allowed.
        results: one for each case, empty where it did not run.
        skipped: why the backend does not take a case, by the case's name.
        passed: it is usable and every error lies within the tolerance.
        milliseconds: forward and backward by profile of lengths, empty where it failed or was not timed.
        why_not_deterministic: why it cannot promise the same bits for every backward pass, None where it can.
        same_bits: several backward passes gave the same bits, in deterministic mode where it has one; None if not tried.
        note: what the backend is good for.
    """

    backend: str
    device: str
    dtype: str
    usable: bool
    why_not: str | None
    tolerance: float
    results: tuple[CaseResult, ...]
    passed: bool
    note: str
    skipped: dict[str, str]
    milliseconds: dict[str, float]
    why_not_deterministic: str | None = None
    same_bits: bool | None = None

    @property
    def worst(self) -> CaseResult | None:
        """The case with the largest error, None where none was run."""
        return max(self.results, key=lambda result: result.worst, default=None)

    @property
    def worst_forward(self) -> CaseResult | None:
        """The case with the largest error of the output."""
        return max(self.results, key=lambda r: math.inf if math.isnan(r.forward) else r.forward, default=None)

    @property
    def worst_backward(self) -> CaseResult | None:
        """The case with the largest error of a gradient."""
        return max(self.results, key=lambda result: result.backward, default=None)

    @property
    def typical_milliseconds(self) -> float:
        """Geometric mean over the profiles; infinite where none was timed."""
        times = self.milliseconds.values()
        return math.exp(sum(map(math.log, times)) / len(times)) if times else math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; an error that is not finite becomes None, which JSON can say."""
        tree = asdict(self)
        for result in tree["results"]:
            for name in _ERRORS:
                result[name] = result[name] if math.isfinite(result[name]) else None
        tree["results"] = list(tree["results"])
        return tree


@dataclass(frozen=True, slots=True)
class Report:
    """All that `certify` found: certificates by type and backend, and the crossover of the hybrid where it was measured."""

    device: torch.device
    certificates: tuple[Certificate, ...]
    crossover: Crossover | None

    def record(self) -> Record:
        """What later runs need of it, for the certificate file."""
        entries = [
            Entry(backend=c.backend, dtype=c.dtype, passed=c.passed, same_bits=c.same_bits, milliseconds=c.milliseconds)
            for c in self.certificates
            if c.usable
        ]
        crossover = self.crossover and CrossoverEntry(**asdict(self.crossover))
        return Record(machine=describe_machine(self.device), made=utc_now(), entries=entries, crossover=crossover)


def certify(
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    timing: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Runs every backend on every case, forward and backward.

    Args:
        device: where; the GPU if there is one.
        dtypes: the types, the one you train in first; by default bfloat16 and float32 on a GPU, float32 and bfloat16 on
            a CPU.
        timing: whether to time those that pass, and to look for the hybrid's crossover.
        progress: called with (stage, done, total).

    Returns:
        One certificate for each type and backend, types in the given order.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtypes is None:
        dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float32)
    pairs = [(backend, dtype) for dtype in dtypes for backend in BACKENDS.values()]
    pairs.sort(
        key=lambda pair: pair[0] is HYBRID
    )  # the last: it needs to know which kernel serves short documents best
    found: dict[tuple[str, torch.dtype], Certificate] = {}
    crossover: Crossover | None = None
    for done, (backend, dtype) in enumerate(pairs):
        if progress is not None:
            progress("certify", done, len(pairs))
        if backend is HYBRID and crossover is None and timing:
            crossover = _find_crossover([c for (_, of), c in found.items() if of == dtypes[0]], device, dtypes[0])
        with using(Choice(crossover=crossover)):
            found[backend.name, dtype] = certify_backend(backend, device, dtype, timing, _trial(backend, crossover))
    if progress is not None:
        progress("certify", len(pairs), len(pairs))
    return Report(device, tuple(found[name, dtype] for dtype in dtypes for name in BACKENDS), crossover)


def certify_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, timing: bool = True, trial: Backend | None = None
) -> Certificate:
    """Runs one backend on every case; a kernel that raises has not passed, and the certificate says what it raised.

    `trial` stands in for it where numbers are checked, the backend itself is timed: the hybrid would otherwise take all
    the small cases for short documents.
    """
    request = Request(device, dtype, head_dim=_HEAD_DIM, windowed=True)
    why_not = backend.why_not(request)
    certificate = Certificate(
        backend=backend.name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        usable=why_not is None,
        why_not=why_not,
        tolerance=TOLERANCES[dtype],
        results=(),
        skipped={},
        passed=False,
        milliseconds={},
        note=backend.note,
    )
    if why_not is not None:
        return certificate
    refusals = {case.name: backend.why_not(replace(request, head_dim=case.head_dim)) for case in CASES}
    skipped = {name: reason for name, reason in refusals.items() if reason is not None}
    checked, no_promise = trial or backend, backend.why_not(replace(request, deterministic=True))
    try:
        results = tuple(run_case(checked.function, case, device, dtype) for case in CASES if case.name not in skipped)
        passed = all(result.worst <= TOLERANCES[dtype] for result in results)
        return replace(
            certificate,
            results=results,
            skipped=skipped,
            passed=passed,
            why_not_deterministic=no_promise,
            same_bits=_repeats_its_bits(checked, device, dtype, promised=no_promise is None) if passed else None,
            milliseconds=time_backend(backend.function, device, dtype) if timing and passed else {},
        )
    except Exception as error:  # kernels fail to compile or launch in many ways; the report is what is wanted
        return replace(certificate, why_not=f"it raised {type(error).__name__}: {error}")


def choose(certificates: Iterable[Certificate]) -> str:
    """The name of the fastest backend that passed in the first type, and that failed in no other type it can run in.

    Raises:
        BackendError: none passed; names what was wrong with each.
    """
    certificates = list(certificates)
    wrong = {c.backend for c in certificates if c.usable and not c.passed}
    first = [c for c in certificates if c.dtype == certificates[0].dtype]
    right = [c for c in first if c.passed and c.backend not in wrong]
    if not right:
        found = "; ".join(f"{c.backend}: {c.why_not or 'wrong numbers'}" for c in first)
        raise BackendError(f"no attention backend passed certification: {found}")
    # Without timings all are equal, and min keeps the first: the order in which "auto" tries them.
    return min(right, key=lambda c: c.typical_milliseconds).backend


def _find_crossover(found: Sequence[Certificate], device: torch.device, dtype: torch.dtype) -> Crossover | None:
    """Where dense attention overtakes the best variable-length kernel; None where there is nothing to compare, or it never does."""
    passed = {c.backend: c for c in found if c.passed}
    rivals = [passed[name] for name in SHORT if name in passed]
    if not rivals or LONG.name not in passed:
        return None
    best = min(rivals, key=lambda c: c.milliseconds["short"]).backend
    crossover = measure_crossover(LONG.function, SHORT[best].function, best, device, dtype)
    return None if crossover.causal is None and crossover.bidirectional is None else crossover


def _trial(backend: Backend, crossover: Crossover | None) -> Backend | None:
    if backend is not HYBRID or crossover is None:
        return None
    short = SHORT[crossover.short]
    low = Crossover(crossover.short, _TRIAL_LENGTH, _TRIAL_LENGTH)
    return replace(backend, function=make_hybrid(LONG.function, short.function, low))


def _repeats_its_bits(backend: Backend, device: torch.device, dtype: torch.dtype, promised: bool) -> bool:
    """Whether several backward passes over one batch, large enough for its blocks to race, give the same bits."""
    unit, num_heads = (1024, 16) if device.type == "cuda" else (64, 4)
    layout = DocumentLayout.from_lengths((4 * unit, unit, 17, 3 * unit, unit // 2, 1), 3, device)
    q, k, v, grad = make_inputs(layout, num_heads, num_heads // 2, _HEAD_DIM, dtype)
    for window in (None, unit // 4):
        with deterministic_algorithms(promised):
            runs = [
                with_gradients(backend.function(q, k, v, layout, window), (q, k, v), grad)
                for _ in range(_BACKWARD_RUNS)
            ]
        if not all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True)):
            return False
    return True
