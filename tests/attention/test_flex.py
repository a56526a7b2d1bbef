"""FlexAttention's mask equals the reference's, its skipped blocks hold nothing, and other lengths compile nothing anew.

Its kernel needs a GPU; on a CPU the forward pass runs unfused.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import make_inputs

from mmctx.attention.cases import CASES
from mmctx.attention.flex import BLOCK, _documents, block_visibility, flex_with, make_block_mask, mask_function
from mmctx.attention.reference import attention_mask, reference_attention
from mmctx.layout import DocumentLayout


def dense_mask(layout: DocumentLayout, window: int | None) -> torch.Tensor:
    token = torch.arange(layout.num_tokens)
    nothing = torch.tensor(0)
    return mask_function(_documents(layout), window)(nothing, nothing, token[:, None], token[None, :])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_equal_the_reference(data):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    layout = DocumentLayout.from_lengths(lengths, data.draw(st.integers(0, len(lengths))))
    window = data.draw(st.none() | st.integers(1, 310))
    expected = attention_mask(layout, window)
    assert torch.equal(dense_mask(layout, window), expected)

    partial, full = block_visibility(layout, _documents(layout), window)
    padding = -layout.num_tokens % BLOCK
    padded = torch.nn.functional.pad(expected, (0, padding, 0, padding))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (M, BLOCK, M, BLOCK)
    holds_some = blocks.any(3).any(1)
    rows = torch.nn.functional.pad(torch.ones(layout.num_tokens, dtype=torch.bool), (0, padding)).view(-1, 1, 1, BLOCK)
    holds_all = (blocks | ~rows.view(-1, BLOCK, 1, 1)).all(3).all(1)
    assert not (holds_some & ~partial & ~full).any()  # nothing that is seen is skipped
    assert not (full & ~holds_all).any()  # nothing that is hidden is taken without its mask
    assert not (partial & full).any()


def test_most_blocks_are_skipped():
    """A window of 128 in a document of 64 blocks: each block of queries meets at most three of keys."""
    layout = DocumentLayout.from_lengths((64 * BLOCK,), 1)
    partial, full = block_visibility(layout, _documents(layout), 128)
    assert (partial | full).sum(1).max() <= 3
    partial, full = block_visibility(layout, _documents(layout), None)
    assert full.sum() == 64 * 63 // 2  # all below the diagonal need no mask


@pytest.mark.parametrize("case", [c for c in CASES if c.head_dim == 64], ids=lambda case: case.name)
def test_forward_equals_reference(case):
    from torch.nn.attention.flex_attention import flex_attention

    layout = DocumentLayout.from_lengths(case.lengths, case.num_causal)
    q, k, v, _ = make_inputs(layout, case.num_heads, case.num_kv_heads, dtype=torch.float32)
    q, k, v = (x.detach() for x in (q, k, v))  # it has no backward pass on a CPU
    found = flex_with(flex_attention, q, k, v, layout, case.window)
    expected = reference_attention(q, k, v, layout, case.window)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_other_lengths_compile_nothing_anew():
    """Traced as on a GPU, run without generated code. No two sizes of the first batch are equal: PyTorch would take them for one."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    for lengths, num_causal in (((100, 90, 133), 2), ((300, 5), 0), ((7, 8, 9, 400, 1), 5), ((257,), 1)):
        layout = DocumentLayout.from_lengths(lengths, num_causal)
        q, k, v, _ = make_inputs(layout, 4, 2, dtype=torch.float32)
        q, k, v = (x.detach() for x in (q, k, v))
        found = flex_with(compiled, q, k, v, layout, 40)
        expected = reference_attention(q, k, v, layout, 40)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    assert counter.frame_count == 1


def test_block_masks_know_the_length():
    mask = make_block_mask(DocumentLayout.from_lengths((200, 100), 1), None)
    assert mask.seq_lengths == (300, 300)
    assert mask.kv_num_blocks.shape == (1, 1, 3)
