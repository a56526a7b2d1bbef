"""The hybrid cuts a pack by document length and puts it together again: any two right kernels make a right one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import make_inputs, run
from torch import Tensor

from mmctx.attention import Backend, BackendError, Request, select_backend
from mmctx.attention.certify import certify_backend
from mmctx.attention.choice import Choice, Crossover, using
from mmctx.attention.hybrid import make_hybrid
from mmctx.attention.reference import reference_attention
from mmctx.attention.sdpa import sdpa_attention
from mmctx.layout import DocumentLayout

CPU = torch.device("cpu")


def dense(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    return reference_attention(q, k, v, layout, window).to(q.dtype)


class Recorder:
    """A kernel that remembers which documents it was given."""

    def __init__(self, function) -> None:
        self.function, self.seen = function, []

    def __call__(self, q, k, v, layout, window):
        self.seen.append((layout.lengths, layout.num_causal, window))
        return self.function(q, k, v, layout, window)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equals_reference_on_any_layout(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=10))
    layout = DocumentLayout.from_lengths(lengths, data.draw(st.integers(0, len(lengths))))
    limits = st.none() | st.integers(1, 31)
    crossover = Crossover("any", causal=data.draw(limits), bidirectional=data.draw(limits))
    window = data.draw(st.none() | st.integers(1, 35))
    q, k, v, grad = make_inputs(layout, num_heads=4, num_kv_heads=2, head_dim=4)
    hybrid = make_hybrid(sdpa_attention, dense, crossover)
    found = run(lambda q, k, v: hybrid(q, k, v, layout, window), q, k, v, grad)
    expected = run(lambda q, k, v: reference_attention(q, k, v, layout, window), q, k, v, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernels", [(sdpa_attention, dense), (dense, sdpa_attention)], ids=["sdpa long", "sdpa short"])
def test_is_certified_like_every_backend(kernels):
    backend = Backend("hybrid", make_hybrid(*kernels, Crossover("any", 32, 40)), lambda request: None, "")
    certificate = certify_backend(backend, CPU, torch.float32, timing=False)
    assert certificate.passed, certificate.worst
    assert certificate.same_bits


def test_each_document_goes_where_its_length_says():
    long, short = Recorder(sdpa_attention), Recorder(sdpa_attention)
    hybrid = make_hybrid(long, short, Crossover("any", causal=20, bidirectional=30))
    layout = DocumentLayout.from_lengths((20, 5, 19, 40, 7, 29, 30, 3), 4)
    q, k, v, _ = make_inputs(layout)
    hybrid(q, k, v, layout, None)
    assert long.seen == [((20,), 1, None), ((40,), 1, None), ((30,), 0, None)]  # one by one, in the packed order
    assert short.seen == [((5, 19, 7, 29, 3), 2, None)]  # together, causal ones still first


def test_under_a_window_only_what_it_does_not_cut_is_long():
    long, short = Recorder(sdpa_attention), Recorder(sdpa_attention)
    hybrid = make_hybrid(long, short, Crossover("any", causal=20, bidirectional=20))
    layout = DocumentLayout.from_lengths((25, 26, 4), 3)
    q, k, v, _ = make_inputs(layout)
    hybrid(q, k, v, layout, 25)
    assert long.seen == [((25,), 1, None)]
    assert short.seen == [((26, 4), 2, 25)]


def test_nothing_long_is_one_call():
    long, short = Recorder(sdpa_attention), Recorder(sdpa_attention)
    layout = DocumentLayout.from_lengths((5, 6), 1)
    q, k, v, _ = make_inputs(layout)
    make_hybrid(long, short, Crossover("any", None, None))(q, k, v, layout, None)
    assert long.seen == []
    assert short.seen == [((5, 6), 1, None)]


def test_layers_share_the_cut():
    long, short = Recorder(sdpa_attention), Recorder(sdpa_attention)
    hybrid = make_hybrid(long, short, Crossover("any", 6, 6))
    layout = DocumentLayout.from_lengths((5, 6, 4), 1)
    q, k, v, _ = make_inputs(layout)
    hybrid(q, k, v, layout, None)
    (cut,) = [part for key, part in layout.cache.items() if key[0] == "hybrid"]
    hybrid(q, k, v, layout, None)
    assert [part for key, part in layout.cache.items() if key[0] == "hybrid"] == [cut]


def test_it_wants_a_measured_crossover_and_a_gpu():
    with pytest.raises(BackendError, match="needs a CUDA device"), using(Choice(crossover=Crossover("flash4", 8, 8))):
        select_backend("hybrid", Request(CPU, torch.float32, 16))
