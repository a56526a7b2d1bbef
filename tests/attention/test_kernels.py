"""The fused kernels: their calls are checked on dense stand-ins anywhere, the kernels themselves on a GPU."""

from __future__ import annotations

import pytest
import torch
from parity import assert_equals_reference, make_inputs, run
from torch import Tensor

from mmctx.attention import BACKENDS, Backend, Request, attention, flash, torch_varlen
from mmctx.attention.cases import CASES, TOLERANCES
from mmctx.attention.reference import reference_attention
from mmctx.layout import DocumentLayout

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
