"""Every backend equals the dense float64 reference, forward and backward, and no document sees another."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_equals_reference, make_inputs, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmctx.attention import BACKENDS, Request, attention, select_backend
from mmctx.attention.cases import CASES, TOLERANCES
from mmctx.attention.reference import attention_mask, reference_attention
from mmctx.errors import BackendError
from mmctx.layout import DocumentLayout

RUNS_ON_CPU = [
    name for name, b in BACKENDS.items() if b.why_not(Request(torch.device("cpu"), torch.float32, 16)) is None
]


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", RUNS_ON_CPU)
def test_equals_reference(backend, case, dtype):
    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal)
    heads = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads, "head_dim": case.head_dim}
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


@pytest.mark.parametrize("num_causal", [0, 1])
def test_work_under_a_window_grows_with_the_length(num_causal):
    """Counted on the meta device: twice the tokens, twice the work, and far less than without the window."""

    def flops(length: int, window: int | None) -> int:
        layout = DocumentLayout.from_lengths((length,), num_causal, device="meta")
        q, k, v = (torch.randn(length, 2, 16, device="meta", requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, layout, window=window, backend="sdpa").sum().backward()
        return counter.get_total_flops()

    short, middle, long = (flops(length, 64) for length in (2048, 4096, 8192))
    assert long - middle == 2 * (middle - short)  # the edges, which have fewer neighbours, cancel out
    assert long < flops(8192, None) / 15


def test_windowed_memory_grows_with_the_length():
    """What is kept for the backward pass: keys and values once, not once for each block that reads them."""
    layout = DocumentLayout.from_lengths((4096,), 1)
    q, k, v, _ = make_inputs(layout, num_heads=2, num_kv_heads=2, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attention(q, k, v, layout, window=256, backend="sdpa")
    assert out.shape == q.shape
    size = q.untyped_storage().nbytes()
    assert (
        sum(kept.values()) < 6 * size + 128 * 384 * 4
    )  # q, k, v, the output, a number a row, and one mask for all blocks


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
