"""Every backend equals the dense float64 reference, forward and backward, and no document sees another."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmctx.attention import BACKENDS, Backend, Request, attention, flash, select_backend
from mmctx.attention.certify import CASES, TOLERANCES
from mmctx.attention.reference import attention_mask, reference_attention
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RUNS_ON_CPU = [
    name for name, b in BACKENDS.items() if b.why_not(Request(torch.device("cpu"), torch.float32, 16)) is None
]


def make_inputs(
    layout: DocumentLayout,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    head_dim: int = 16,
    dtype=torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v as leaves, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    device = layout.cu_seqlens.device
    q, k, v, grad = (
        torch.randn(layout.num_tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def run(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """(output, grad_q, grad_k, grad_v)"""
    out = function(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)))


def assert_equals_reference(
    layout: DocumentLayout, window: int | None, backend: str, tolerance: float, **inputs
) -> None:
    q, k, v, grad = make_inputs(layout, **inputs)
    found = run(lambda q, k, v: attention(q, k, v, layout, window=window, backend=backend), q, k, v, grad)
    expected = run(lambda q, k, v: reference_attention(q, k, v, layout, window), q, k, v, grad)
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), found, expected, strict=True):
        assert a.dtype == q.dtype
        assert a.shape == b.shape
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)).item()
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", RUNS_ON_CPU)
def test_equals_reference(backend, case, dtype):
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal)
    heads = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads}
    assert_equals_reference(layout, case.window, backend, TOLERANCES[dtype], dtype=dtype, **heads)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_reference_on_any_layout(data):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    layout = DocumentLayout.from_lengths(lengths, data.draw(st.integers(0, len(lengths))))
    num_kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    num_heads = num_kv_heads * data.draw(st.sampled_from([1, 2]))
    window = data.draw(st.none() | st.integers(1, 45))
    assert_equals_reference(layout, window, "sdpa", 1e-12, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=4)


@pytest.mark.parametrize("window", [1, 3, 100, 128, 200])
@pytest.mark.parametrize("num_causal", [0, 1, 4])
def test_long_documents_in_window_blocks(window, num_causal):
    """257 and 500 tokens take several blocks with a part of one at the end; equal lengths share the blocks' calls."""
    layout = DocumentLayout.from_lengths((500, 257, 257, 5), num_causal)
    assert_equals_reference(layout, window, "sdpa", 1e-12, num_heads=2, num_kv_heads=1, head_dim=4)


def test_window_counts_the_own_position():
    """Transformers' convention: causal i - w < j <= i, and |i - j| < w in both directions."""
    mask = attention_mask(DocumentLayout.from_lengths((4, 4), 1), window=2)
    assert mask[:4, :4].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask[4:, 4:].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert not mask[:4, 4:].any()
    assert not mask[4:, :4].any()


def test_takes_views_of_a_fused_projection():
    layout = DocumentLayout.from_lengths((7, 7, 30, 6, 21), 3)
    fused = torch.randn(layout.num_tokens, 3, 4, 16, dtype=torch.float64)
    q, k, v = fused.unbind(1)
    torch.testing.assert_close(attention(q, k, v, layout), reference_attention(q, k, v, layout))


def test_autocast_decides_the_type():
    layout = DocumentLayout.from_lengths((7, 20), 1)
    q, k, v, _ = make_inputs(layout, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v.bfloat16(), layout)
    assert out.dtype == torch.bfloat16
    assert (out.double() - reference_attention(q, k, v, layout)).abs().max() < 0.05


# ---- isolation

LEAKY_LAYOUTS = [((16, 16, 16, 9, 30, 90, 16), 3, None), ((12, 11, 10, 40, 38, 1), 2, 4), ((290, 12, 300, 11), 2, 60)]


@pytest.mark.parametrize(("lengths", "num_causal", "window"), LEAKY_LAYOUTS)
@pytest.mark.parametrize("replacement", [3.0, float("nan")])
def test_no_document_sees_another(lengths, num_causal, window, replacement):
    """Whatever one document holds, even NaN, the others' outputs and gradients stay bit for bit the same."""
    layout = DocumentLayout.from_lengths(lengths, num_causal)
    q, k, v, grad = make_inputs(layout, num_heads=2, num_kv_heads=1, dtype=torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, window=window)

    before = run(attend, q, k, v, grad)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        start += length
        changed = [x.detach().clone() for x in (q, k, v, grad)]
        for x in changed:
            x[own] = replacement
        after = run(attend, *(x.requires_grad_() for x in changed[:3]), changed[3])
        others = torch.ones(layout.num_tokens, dtype=torch.bool)
        others[own] = False
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[others], b[others])


def test_no_token_sees_the_future_of_its_document():
    layout = DocumentLayout.from_lengths((20, 20, 17), 3)
    q, k, v, _ = make_inputs(layout)
    out = attention(q, k, v, layout)
    k2, v2 = k.detach().clone(), v.detach().clone()
    for x in (k2, v2):
        x[30:40] = 7.0  # the second half of the second document
    assert torch.equal(out[:30], attention(q, k2, v2, layout)[:30])


# ---- the work is done once


def test_layers_share_the_plan():
    layout = DocumentLayout.from_lengths((5, 9, 5, 30), 2)
    q, k, v, _ = make_inputs(layout)
    attention(q, k, v, layout, backend="sdpa")
    plan = layout.cache[("sdpa", None)]
    attention(q, k, v, layout, backend="sdpa")
    assert layout.cache[("sdpa", None)] is plan
    attention(q, k, v, layout, backend="sdpa", window=31)  # no document is that long: the same work
    assert list(layout.cache) == [("sdpa", None)]
    attention(q, k, v, layout, backend="sdpa", window=3)
    assert ("sdpa", 3) in layout.cache


def test_equal_documents_need_no_gather():
    plan_of = {}
    for lengths in ((16,) * 8, (16, 17, 16, 300)):
        layout = DocumentLayout.from_lengths(lengths, len(lengths))
        q, k, v, _ = make_inputs(layout)
        attention(q, k, v, layout, backend="sdpa")
        plan_of[lengths] = layout.cache[("sdpa", None)]
    equal, unequal = plan_of.values()
    assert len(equal.buckets) == 1
    assert equal.token_of_slot is None
    assert [(bucket.count, bucket.length) for bucket in unequal.buckets] == [(3, 17), (1, 300)]
    assert unequal.padding.tolist() == [16, 50]


# ---- refusals


def test_wrong_shapes_name_both_numbers():
    layout = DocumentLayout.from_lengths((5, 6), 1)
    q, k, v, _ = make_inputs(layout, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"10 tokens .* 2 documents have 11"):
        attention(q[:10], k[:10], v[:10], layout)
    with pytest.raises(ValueError, match=r"3 query heads .* 2 key heads"):
        attention(q[:, :3], k, v, layout)
    with pytest.raises(ValueError, match=r"\(11, 2, 16\) and \(11, 1, 16\)"):
        attention(q, k, v[:, :1], layout)
    with pytest.raises(ValueError, match=r"\(11, 4, 8\) and \(11, 2, 16\)"):
        attention(q[..., :8], k, v, layout)
    with pytest.raises(ValueError, match=r"float64.*float32"):
        attention(q, k.float(), v.float(), layout)
    with pytest.raises(ValueError, match=r"at least 1 .* found 0"):
        attention(q, k, v, layout, window=0)
    with pytest.raises(ValueError, match=r"layout\.to\(device\)"):
        attention(q, k, v, layout.to("meta"))


def test_unusable_backend_says_why_and_what_to_do():
    layout = DocumentLayout.from_lengths((5,), 1)
    q, k, v, _ = make_inputs(layout)
    for name in ("torch_varlen", "flash2", "flash4"):
        with pytest.raises(BackendError, match=f"'{name}' cannot run here: it needs a CUDA device.*'auto'"):
            attention(q, k, v, layout, backend=name)
    with pytest.raises(BackendError, match=r"unknown attention backend 'flsh'; .* one of .*sdpa"):
        attention(q, k, v, layout, backend="flsh")


def test_auto_takes_sdpa_on_cpu():
    assert select_backend("auto", Request(torch.device("cpu"), torch.float32, 64)).name == "sdpa"


def test_nothing_to_attend_to():
    empty = torch.zeros(0, 4, 16)
    assert attention(empty, empty, empty, DocumentLayout.from_lengths((), 0)).shape == (0, 4, 16)


def test_import_loads_no_optional_kernel():
    code = "import sys, mmctx.attention; assert 'flash_attn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- fused kernels: their calls on dense stand-ins anywhere, themselves on a GPU


def dense_varlen(q, k, v, cu_seqlens, max_seqlen, causal, left, right):
    """What a variable-length kernel promises: keys from `left` before to `right` after the query, None without limit."""
    assert type(max_seqlen) is int
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == len(q)
    lengths = cu_seqlens.diff()
    assert max_seqlen == lengths.max()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    ahead = torch.arange(len(q))[None, :] - torch.arange(len(q))[:, None]
    mask = document[:, None] == document[None, :]
    for excluded in (causal and ahead > 0, left is not None and ahead < -left, right is not None and ahead > right):
        mask &= ~torch.as_tensor(excluded)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def flash2_stand_in(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False, window_size=(-1, -1)
):
    left, right = (None if reach == -1 else reach for reach in window_size)
    return dense_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, causal, left, right)


def flash4_stand_in(
    q, k, v, qv=None, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size=(None, None)
):
    assert -1 not in window_size
    return dense_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, causal, *window_size), None


def varlen_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):  # PyTorch 2.12 and newer
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_211_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def varlen_211_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    left, right = (None if reach == -1 else reach for reach in window_size)
    return dense_varlen(query, key, value, cu_seq_q, max_q, False, left, right)


STAND_INS = {
    "flash2": [flash2_stand_in],
    "flash4": [flash4_stand_in],
    "torch_varlen": [varlen_stand_in, varlen_211_stand_in],
}


@pytest.mark.parametrize("case", [case for case in CASES if max(case.lengths) < 200], ids=lambda case: case.name)
@pytest.mark.parametrize(("name", "stand_in"), [(name, f) for name, fs in STAND_INS.items() for f in fs])
def test_kernels_are_called_by_their_signatures(monkeypatch, name, stand_in, case):
    from mmctx.attention import torch_varlen

    monkeypatch.setattr(flash, "_kernel", lambda module: stand_in)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    torch_varlen._parameters.cache_clear()
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal)
    q, k, v, grad = make_inputs(layout, case.num_heads, case.num_kv_heads)
    found = run(lambda q, k, v: BACKENDS[name].function(q, k, v, layout, case.window), q, k, v, grad)
    torch_varlen._parameters.cache_clear()
    expected = run(lambda q, k, v: reference_attention(q, k, v, layout, case.window), q, k, v, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_equals_reference_on_gpu(backend: Backend, case, dtype):
    reason = backend.why_not(Request(torch.device("cuda", 0), dtype, 64, windowed=case.window is not None))
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal, device="cuda:0")
    heads = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads}
    assert_equals_reference(layout, case.window, backend.name, TOLERANCES[dtype], dtype=dtype, head_dim=64, **heads)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_never_waits_for_the_gpu(backend: Backend, window: int | None):
    device = torch.device("cuda", 0)
    reason = backend.why_not(Request(device, torch.bfloat16, 64))
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    layout = DocumentLayout.from_lengths((40, 300, 17, 18, 30), 3, device=device)
    q, k, v, grad = make_inputs(layout, head_dim=64, dtype=torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, window=window, backend=backend.name)

    run(attend, q, k, v, grad)  # compiles and plans
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attend, q, k, v, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
