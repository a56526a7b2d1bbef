"""The fused kernels: their calls are checked on dense stand-ins anywhere, the kernels themselves on a GPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from parity import assert_equals_reference, make_inputs, run
from torch import Tensor

from mmctx.attention import BACKENDS, Backend, Request, attention, flash, torch_varlen
from mmctx.attention.cases import CASES, TOLERANCES
from mmctx.attention.reference import reference_attention
from mmctx.determinism import deterministic_algorithms
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


# Parameters as the packages have them: flash-attn 2.8.3 and flash-attn-4 4.0.0b36 (`flash_attn_varlen_func`), and
# `torch.nn.attention.varlen.varlen_attn` of PyTorch. All can be given by name but for those after a bare *.
PUBLISHED = {
    (
        "flash2",
        "2.8.3",
    ): "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 softmax_scale=None causal=False "
    "window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False block_table=None",
    (
        "flash4",
        "4.0.0b36",
    ): "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None min_seqlen_k=None "
    "seqused_q=None seqused_k=None gather_kv_indices=None page_table=None softmax_scale=None causal=False "
    "window_size=(None,None) learnable_sink=None softcap=0.0 num_splits=1 pack_gqa=None deterministic=False score_mod=None "
    "score_mod_bwd=None mask_mod=None block_sparse_tensors=None aux_tensors=None aux_scalars=None return_lse=False "
    "scheduler_metadata=None seqlen_k_per_split=None disable_scheduler_metadata=False gather_bwd_recompute_p=False "
    "gather_bwd_token_chunk=None",
    ("torch_varlen", "2.10"): "query key value cu_seq_q cu_seq_k max_q max_k is_causal=False return_aux=None",
    (
        "torch_varlen",
        "2.11",
    ): "query key value cu_seq_q cu_seq_k max_q max_k * return_aux=None scale=None window_size=(-1,-1)",
    (
        "torch_varlen",
        "2.12 to 2.14",
    ): "query key value cu_seq_q cu_seq_k max_q max_k * return_aux=None scale=None window_size=(-1,-1) "
    "enable_gqa=False seqused_k=None block_table=None num_splits=None",
}


def published(text: str) -> inspect.Signature:
    """The signature that a line of `PUBLISHED` writes down."""
    namespace: dict = {}
    exec(f"def function({', '.join(text.split())}): ...", namespace)
    return inspect.signature(namespace["function"])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("name", "version"), PUBLISHED, ids=" ".join)
def test_calls_bind_to_the_published_signatures(monkeypatch, name, version, window, deterministic):
    signature, bound = published(PUBLISHED[name, version]), []

    def kernel(*args, **kwargs):
        bound.append(signature.bind(*args, **kwargs).arguments)  # raises TypeError as the kernel would
        return args[0] if args else kwargs["q"]

    kernel.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(flash, "_kernel", lambda module: kernel)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch_varlen._parameters.cache_clear()
    layout = DocumentLayout.from_lengths((5, 6, 7), 2)
    q, k, v, _ = make_inputs(layout, 4, 2)
    with deterministic_algorithms(deterministic):
        BACKENDS[name].function(q, k, v, layout, window)
    torch_varlen._parameters.cache_clear()
    causal, bidirectional = bound
    if name == "torch_varlen":
        grouped = "enable_gqa" in signature.parameters
        assert all(call["key"].shape[1] == (2 if grouped else 4) for call in bound)
    elif deterministic:
        assert causal["deterministic"] is bidirectional["deterministic"] is True
    if (name, version) == ("torch_varlen", "2.10"):
        assert (causal["is_causal"], bidirectional["is_causal"]) == (True, False)
        return
    none = None if name == "flash4" else -1
    unlimited = (7, 7) if name == "torch_varlen" and deterministic else (none, none)  # off cuDNN: it promises nothing
    assert causal["window_size"] == ((none, 0) if window is None else (2, 0))
    assert bidirectional["window_size"] == (unlimited if window is None else (2, 2))


def test_the_installed_torch_has_a_published_signature():
    from torch.nn.attention.varlen import varlen_attn

    known = {
        version: list(published(text).parameters)
        for (name, version), text in PUBLISHED.items()
        if name == "torch_varlen"
    }
    assert list(inspect.signature(varlen_attn).parameters) in known.values()


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_equals_reference_on_gpu(backend: Backend, case, dtype):
    request = Request(torch.device("cuda", 0), dtype, case.head_dim, windowed=case.window is not None)
    reason = backend.why_not(request)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal, device="cuda:0")
    heads = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads, "head_dim": case.head_dim}
    assert_equals_reference(layout, case.window, backend.name, TOLERANCES[dtype], dtype=dtype, **heads)


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
        with pytest.raises(RuntimeError):  # the detector does detect
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
