"""Certification passes what is right, fails every planted mistake, and its report can be printed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mmctx.attention import BACKENDS, Backend
from mmctx.attention.certify import CASES, TOLERANCES, Certificate, certify, certify_backend, choose
from mmctx.attention.reference import reference_attention
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

CPU = torch.device("cpu")


def dense(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    return reference_attention(q, k, v, layout, window).to(q.dtype)


def ignores_boundaries(q, k, v, layout, window):
    joined = (layout.num_causal_tokens, layout.num_tokens - layout.num_causal_tokens)
    lengths = [length for length in joined if length]
    return dense(q, k, v, DocumentLayout.from_lengths(lengths, int(joined[0] > 0)), window)


def window_off_by_one(q, k, v, layout, window):
    return dense(q, k, v, layout, window and window + 1)


def ignores_window(q, k, v, layout, window):
    return dense(q, k, v, layout, None)


def loses_causal(q, k, v, layout, window):
    return dense(q, k, v, DocumentLayout.from_lengths(layout.lengths, 0), window)


def all_causal(q, k, v, layout, window):
    return dense(q, k, v, DocumentLayout.from_lengths(layout.lengths, len(layout.lengths)), window)


def shares_heads_in_turn(q, k, v, layout, window):
    """Query head h reads key head h % Hk instead of h // (Hq / Hk)."""
    repeats = q.shape[1] // k.shape[1]
    return dense(q, k.repeat(1, repeats, 1), v.repeat(1, repeats, 1), layout, window)


def forgets_scale(q, k, v, layout, window):
    return dense(q * 1.1, k, v, layout, window)


def stops_the_gradient_of_k(q, k, v, layout, window):
    return dense(q, k.detach() + 0 * k, v, layout, window)


def leaves_nan_in_the_gradient(q, k, v, layout, window):
    return dense(q, k, v, layout, window) + 0 * (v - v.detach()).abs().sqrt().sum()


MISTAKES = [
    ignores_boundaries,
    window_off_by_one,
    ignores_window,
    loses_causal,
    all_causal,
    shares_heads_in_turn,
    forgets_scale,
    stops_the_gradient_of_k,
    leaves_nan_in_the_gradient,
]


def plant(function, name: str = "planted") -> Backend:
    return Backend(name=name, function=function, why_not=lambda request: None, note="")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_every_mistake_fails(mistake):
    """In bfloat16, whose tolerance is the widest: what fails there fails in every type."""
    dtype = torch.bfloat16
    certificate = certify_backend(plant(mistake), CPU, dtype, timing=False)
    assert certificate.usable, certificate.why_not
    assert not certificate.passed
    assert certificate.worst is not None
    assert certificate.worst.worst > TOLERANCES[dtype]
    json.dumps(certificate.to_json(), allow_nan=False)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_right_passes(dtype):
    certificate = certify_backend(plant(dense), CPU, dtype, timing=False)
    assert certificate.passed, certificate.worst
    assert [result.case for result in certificate.results] == [case.name for case in CASES]


def test_report_of_this_machine():
    certificates = certify("cpu", dtypes=(torch.float32,))
    assert [certificate.backend for certificate in certificates] == list(BACKENDS)
    by_name = {certificate.backend: certificate for certificate in certificates}
    assert by_name["sdpa"].passed
    assert (by_name["sdpa"].milliseconds or 0) > 0
    assert not by_name["torch_varlen"].usable
    assert "CUDA" in (by_name["torch_varlen"].why_not or "")
    assert choose(certificates) == "sdpa"
    tree = json.loads(json.dumps([certificate.to_json() for certificate in certificates], allow_nan=False))
    assert tree[-1]["results"][0]["case"] == "causal"


def test_a_kernel_that_raises_is_reported():
    def broken(q, k, v, layout, window):
        raise RuntimeError("no kernel image is available")

    certificate = certify_backend(plant(broken), CPU, torch.float32)
    assert certificate.usable  # "auto" would take it: `mmctx doctor` must fail
    assert not certificate.passed
    assert certificate.why_not == "it raised RuntimeError: no kernel image is available"


def certificate(
    backend: str, passed: bool = True, dtype: str = "bfloat16", milliseconds: float | None = 1.0
) -> Certificate:
    return Certificate(
        backend=backend,
        device="cuda:0",
        dtype=dtype,
        usable=True,
        why_not=None,
        tolerance=0.03,
        results=(),
        passed=passed,
        milliseconds=milliseconds,
        note="",
    )


def test_choose_takes_the_fastest_that_is_right():
    assert choose([certificate("a", milliseconds=3.0), certificate("b", milliseconds=2.0)]) == "b"
    assert choose([certificate("a", milliseconds=3.0), certificate("b", passed=False, milliseconds=None)]) == "a"
    assert choose([certificate("a", milliseconds=None), certificate("b", milliseconds=None)]) == "a"
    wrong_elsewhere = certificate("b", passed=False, dtype="float32", milliseconds=None)
    assert choose([certificate("a", milliseconds=3.0), certificate("b", milliseconds=2.0), wrong_elsewhere]) == "a"
    with pytest.raises(BackendError, match="a: wrong numbers"):
        choose([certificate("a", passed=False)])
