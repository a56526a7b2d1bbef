"""The chunked loss against `F.cross_entropy` on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmctx.objectives.linear_cross_entropy import _LinearCrossEntropy, linear_cross_entropy
from mmctx.pack import IGNORE_INDEX


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 24).to(dtype).requires_grad_()
    weight = torch.randn(101, 24).to(dtype).requires_grad_()
    labels = torch.randint(0, 101, (37,))
    labels[::5] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize(("smoothing", "biased"), [(0.0, False), (0.1, False), (0.9, False), (0.0, True), (0.1, True)])
@pytest.mark.parametrize("chunk_size", [1, 8, 37, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_equals_cross_entropy(
    dtype: torch.dtype, tolerance: float, chunk_size: int, smoothing: float, biased: bool
) -> None:
    hidden, weight, labels = problem(dtype)
    bias = torch.randn(101).to(dtype).requires_grad_() if biased else None
    # multiplies in bf16 on any processor
    got = _LinearCrossEntropy.apply(hidden, weight, bias, labels, chunk_size, smoothing)
    logits = hidden @ weight.T
    logits = logits if dtype == torch.float64 else logits.float()
    logits = logits if bias is None else logits + bias
    options = {"ignore_index": IGNORE_INDEX, "reduction": "sum", "label_smoothing": smoothing}
    want = F.cross_entropy(logits, labels, **options)
    # the value is exact in every dtype: both sum the same logits in fp32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    learned = [hidden, weight] if bias is None else [hidden, weight, bias]
    got_grads = torch.autograd.grad(got * 0.7, learned)
    want_grads = torch.autograd.grad(want * 0.7, learned)
    for ours, theirs in zip(got_grads, want_grads, strict=True):
        assert ours.dtype == dtype
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


def test_bf16_is_exact_whatever_the_processor_multiplies() -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    got = linear_cross_entropy(hidden, weight, labels)
    got.backward()
    want = F.cross_entropy(hidden.double() @ weight.double().T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    torch.testing.assert_close(
        got.double(), want, rtol=1e-3, atol=0
    )  # logits of 15 may be rounded to bf16, sums may not
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_ignored_rows_get_no_gradient() -> None:
    hidden, weight, labels = problem(torch.float32)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    assert (grad[::5] == 0).all()
    assert (grad[1::5] != 0).any(dim=1).all()


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, labels = problem(torch.float32)
    loss = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert not loss.requires_grad


def test_second_backward_is_refused() -> None:
    hidden, weight, labels = problem(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss anew"):
        loss.backward()


def test_under_autocast_products_run_in_bf16_and_gradients_return_in_fp32() -> None:
    hidden, weight, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    want = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(loss, want)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    hidden, weight, labels = problem(torch.float32)
    loss = linear_cross_entropy(hidden[1 : 1 + rows], weight, labels[1 : 1 + rows])
    loss.backward()
    assert torch.isfinite(loss)
