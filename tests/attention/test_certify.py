"""Certification passes what is right, fails every planted mistake, and its report can be printed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mmctx.attention import BACKENDS, Backend
from mmctx.attention.cases import CASES, TOLERANCES
from mmctx.attention.certify import Certificate, certify, certify_backend, choose
from mmctx.attention.reference import reference_attention
from mmctx.attention.timing import PROFILES, draw_lengths, first_that_stays_faster
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
    report = certify("cpu", dtypes=(torch.float32,))
    certificates = report.certificates
    assert [certificate.backend for certificate in certificates] == list(BACKENDS)
    by_name = {certificate.backend: certificate for certificate in certificates}
    sdpa = by_name["sdpa"]
    assert sdpa.passed
    assert sdpa.same_bits
    assert sdpa.milliseconds.keys() == PROFILES.keys()
    assert min(sdpa.milliseconds.values()) > 0
    assert not by_name["torch_varlen"].usable
    assert "CUDA" in (by_name["torch_varlen"].why_not or "")
    assert "no backward" in (by_name["flex"].why_not or "")
    assert choose(certificates) == "sdpa"
    tree = json.loads(json.dumps([certificate.to_json() for certificate in certificates], allow_nan=False))
    assert tree[list(BACKENDS).index("sdpa")]["results"][0]["case"] == "causal"
    assert [entry.backend for entry in report.record().entries] == ["sdpa"]  # those that say they can run


def test_cases_cover_what_the_issue_names():
    """Every pattern, and both sides of a window's edges: a later edit must not thin them out unseen."""
    windows = {(c.window == 1, c.window == max(c.lengths), c.window == max(c.lengths) - 1) for c in CASES if c.window}
    assert {(True, False, False), (False, True, False), (False, False, True)} <= windows
    for windowed in (False, True):
        of_kind = [c for c in CASES if (c.window is not None) == windowed]
        assert any(c.num_causal == len(c.lengths) for c in of_kind)
        assert any(c.num_causal == 0 for c in of_kind)
        assert any(0 < c.num_causal < len(c.lengths) for c in of_kind)
        assert any(c.num_heads != c.num_kv_heads for c in of_kind)
    assert any(c.lengths.count(1) > 3 for c in CASES)
    assert {32, 64, 96, 128, 256} <= {c.head_dim for c in CASES}


def test_different_bits_in_the_backward_pass_are_noticed():
    generator = torch.Generator()

    def unsteady(q, k, v, layout, window):
        noise = 1 + 1e-7 * torch.rand(1, generator=generator)
        return dense(q * noise, k, v, layout, window)

    certificate = certify_backend(plant(unsteady), CPU, torch.float32, timing=False)
    assert certificate.passed  # right within the tolerance
    assert certificate.same_bits is False


def test_profiles_fill_the_batch_and_change():
    for profile in PROFILES.values():
        drawn = [draw_lengths(profile, 4096, seed) for seed in range(4)]
        assert all(sum(lengths) == 4096 for lengths, _ in drawn)
        assert all(min(lengths) >= 1 and 0 < causal <= len(lengths) for lengths, causal in drawn)
    assert len({tuple(draw_lengths(PROFILES["mixed"], 4096, seed)[0]) for seed in range(4)}) == 4


def test_crossover_is_where_long_stays_faster():
    assert first_that_stays_faster((1, 2, 4, 8), (5, 1, 2, 3), (4, 4, 4, 4)) == 2
    assert first_that_stays_faster((1, 2, 4, 8), (1, 9, 2, 3), (4, 4, 4, 4)) == 4  # a lucky moment at 1 does not count
    assert first_that_stays_faster((1, 2), (1, 9), (4, 4)) is None


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
        skipped={},
        milliseconds={} if milliseconds is None else {"mixed": milliseconds},
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
