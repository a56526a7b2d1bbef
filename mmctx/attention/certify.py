"""Certifies the attention backends on this machine against a dense float64 reference; what `mmctx doctor` runs.

    certificates = certify()
    best = choose(certificates)

Every case is small enough for the dense reference and made so that the usual mistakes show: a document that sees its
neighbour, a window that is off by one, a lost causal flag, grouped heads read in the wrong order.

Shapes: T tokens, Hq query heads, Hk key and value heads, d head dimension.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmctx.attention import BACKENDS
from mmctx.attention.backend import Backend, Request
from mmctx.attention.reference import reference_attention
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""Largest error allowed, relative to the largest magnitude of the reference. Each is a few roundings of its type: the
inputs of the reference are rounded first, so that only the computation differs."""

_ERRORS = ("forward", "grad_q", "grad_k", "grad_v")
_HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class Case:
    """One layout to certify on; `lengths`, `num_causal` and `window` as in `DocumentLayout` and `attention`."""

    name: str
    lengths: tuple[int, ...]
    num_causal: int
    window: int | None = None
    num_heads: int = 4
    num_kv_heads: int = 4


CASES: tuple[Case, ...] = (
    Case("causal", (17, 40, 5, 33, 64), 5),
    Case("bidirectional", (17, 40, 5, 33, 64), 0),
    Case("mixed", (31, 16, 16, 45, 16, 16, 23), 4),
    Case("causal window", (50, 7, 129, 8, 20), 5, window=7),
    Case("bidirectional window", (50, 7, 129, 8, 20), 0, window=7),
    Case("mixed window", (300, 1, 40, 270, 33, 30), 3, window=16),
    Case("grouped heads", (40, 9, 30, 12), 2, num_heads=8, num_kv_heads=2),
    Case("grouped heads, window", (40, 9, 30, 12), 2, window=5, num_heads=6, num_kv_heads=3),
    Case("one-token documents", (1, 1, 9, 1, 1, 6, 1), 4),
    Case("very uneven", (2, 400, 1, 3, 150, 4), 3),
)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The largest errors of one case over the largest magnitude of the reference; NaN where a value is not finite."""

    case: str
    forward: float
    grad_q: float
    grad_k: float
    grad_v: float

    @property
    def worst(self) -> float:
        """The largest of the four; infinite where any is NaN, so that it never passes."""
        errors = [getattr(self, name) for name in _ERRORS]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)


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
        passed: it is usable and every error lies within the tolerance.
        milliseconds: forward and backward on the standard shape, None where it failed or was not timed.
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
    milliseconds: float | None
    note: str

    @property
    def worst(self) -> CaseResult | None:
        """The case with the largest error, None where none was run."""
        return max(self.results, key=lambda result: result.worst, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; an error that is not finite becomes None, which JSON can say."""
        tree = asdict(self)
        for result in tree["results"]:
            for name in _ERRORS:
                result[name] = result[name] if math.isfinite(result[name]) else None
        tree["results"] = list(tree["results"])
        return tree


def certify(
    device: torch.device | str | None = None, dtypes: Sequence[torch.dtype] | None = None, timing: bool = True
) -> list[Certificate]:
    """Runs every backend on every case, forward and backward.

    Args:
        device: where; the GPU if there is one.
        dtypes: the types, the one you train in first; by default bfloat16 and float32 on a GPU, float32 and bfloat16 on
            a CPU.
        timing: whether to time those that pass on the standard shape.

    Returns:
        One certificate for each type and backend, types in the given order.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtypes is None:
        dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float32)
    return [certify_backend(backend, device, dtype, timing) for dtype in dtypes for backend in BACKENDS.values()]


def certify_backend(backend: Backend, device: torch.device, dtype: torch.dtype, timing: bool = True) -> Certificate:
    """Runs one backend on every case; a kernel that raises has not passed, and the certificate says what it raised."""
    results: list[CaseResult] = []
    milliseconds = None
    passed = False
    why_not = backend.why_not(Request(device, dtype, head_dim=_HEAD_DIM, windowed=True))
    usable = why_not is None
    if usable:
        try:
            results = [_run_case(backend, case, device, dtype) for case in CASES]
            passed = all(result.worst <= TOLERANCES[dtype] for result in results)
            if timing and passed:
                milliseconds = _time(backend, device, dtype)
        except Exception as error:  # kernels fail to compile or launch in many ways; the report is what is wanted
            why_not, results, passed = f"it raised {type(error).__name__}: {error}", [], False
    return Certificate(
        backend=backend.name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        usable=usable,
        why_not=why_not,
        tolerance=TOLERANCES[dtype],
        results=tuple(results),
        passed=passed,
        milliseconds=milliseconds,
        note=backend.note,
    )


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
    return min(right, key=lambda c: math.inf if c.milliseconds is None else c.milliseconds).backend


def _run_case(backend: Backend, case: Case, device: torch.device, dtype: torch.dtype) -> CaseResult:
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal, device)
    q, k, v, grad = _inputs(layout, case.num_heads, case.num_kv_heads, _HEAD_DIM, dtype)
    found = _with_gradients(backend.function(q, k, v, layout, case.window), (q, k, v), grad)
    expected = _with_gradients(reference_attention(q, k, v, layout, case.window), (q, k, v), grad.double())
    return CaseResult(case.name, *(_error(a, b) for a, b in zip(found, expected, strict=True)))


def _inputs(layout: DocumentLayout, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
    """q (T, Hq, d), k and v (T, Hk, d), and the gradient of the output; the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        x = torch.randn(layout.num_tokens, heads, head_dim, generator=generator)
        return x.to(layout.cu_seqlens.device, dtype)

    q, k, v = (normal(heads).requires_grad_() for heads in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v, normal(num_heads)


def _with_gradients(out: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected: of single elements near zero, a relative error says nothing."""
    expected = expected.double()
    difference = (found.double() - expected).abs().max()
    return (difference / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()


def _time(backend: Backend, device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Median milliseconds, forward and backward, of the standard shape: one long document, some middling, many short."""
    on_gpu = device.type == "cuda"
    unit, num_heads, head_dim = (512, 16, 128) if on_gpu else (32, 4, 64)
    lengths = (16 * unit, *[4 * unit] * 4, *[unit] * 16, *[unit // 2] * 32)  # 64 units: 32,768 tokens on a GPU, 2,048
    layout = DocumentLayout.from_lengths(lengths, len(lengths), device)
    q, k, v, grad = _inputs(layout, num_heads, num_heads, head_dim, dtype)
    times = []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.autograd.grad(backend.function(q, k, v, layout, None), (q, k, v), grad)
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first one compiles, plans and warms up
