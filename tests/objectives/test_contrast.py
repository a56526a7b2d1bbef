"""The tiled contrastive losses against open_clip's and against PyTorch's own cross entropy over the whole matrix, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.objectives.contrast import Partners, info_nce, pairwise_sigmoid
from mmctx.objectives.contrastive import Candidates
from mmctx.objectives.roster import Roster


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def partners_of(columns: list[int], num_columns: int, kinds: tuple[list[int], list[int]] | None = None) -> Partners:
    """From the partner of each row, -1 for none."""
    found = torch.tensor(columns)
    is_partner = torch.zeros(num_columns, dtype=torch.bool)
    is_partner[found[found >= 0]] = True
    tensors = None if kinds is None else (torch.tensor(kinds[0]), torch.tensor(kinds[1]))
    return Partners(found.clamp(min=0), found >= 0, is_partner, tensors)


def check(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(
        torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 5, 32, None])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_info_nce_is_open_clips(tile: int | None, scale: float) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the clip extra")
    torch.manual_seed(0)
    a, b, s = unit(32, 16), unit(32, 16), scalar(scale)
    ours = info_nce(a, b, s, partners_of(list(range(32)), 32), tile=tile) / 64
    check(ours, open_clip.ClipLoss()(a, b, s), a, b, s)


@pytest.mark.parametrize("tile", [1, 5, None])
def test_the_sigmoid_is_open_clips(tile: int | None) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the clip extra")
    torch.manual_seed(0)
    a, b, s, bias = unit(32, 16), unit(32, 16), scalar(10.0), scalar(-10.0)
    ours = pairwise_sigmoid(a, b, s, bias, partners_of(list(range(32)), 32), tile=tile) / 32
    check(ours, open_clip.loss.SigLipLoss()(a, b, s, bias), a, b, s, bias)


@pytest.mark.parametrize("tile", [1, 3, None])
def test_lonely_rows_and_columns_are_candidates_only(tile: int | None) -> None:
    torch.manual_seed(0)
    columns = [4, -1, 0, 6, -1, -1, 2]
    a, b, s, bias = unit(7, 8), unit(9, 8), scalar(20.0), scalar(-3.0)
    rows = [row for row, column in enumerate(columns) if column >= 0]
    theirs = [columns[row] for row in rows]
    scores = s * a @ b.T
    want = F.cross_entropy(scores[rows], torch.tensor(theirs), reduction="sum")
    want = want + F.cross_entropy(scores.T[theirs], torch.tensor(rows), reduction="sum")
    check(info_nce(a, b, s, partners_of(columns, 9), tile=tile), want, a, b, s)
    signs = -torch.ones(7, 9, dtype=torch.float64)
    signs[rows, theirs] = 1
    want = -F.logsigmoid(signs * (s * a @ b.T + bias)).sum()
    check(pairwise_sigmoid(a, b, s, bias, partners_of(columns, 9), tile=tile), want, a, b, s, bias)


@pytest.mark.parametrize("tile", [1, 4, None])
def test_kinds_are_losses_of_their_own(tile: int | None) -> None:
    """Comparing within kinds is comparing each kind alone; a kind of which one side has nothing harms nobody."""
    torch.manual_seed(0)
    a, b, s, bias = unit(8, 8), unit(8, 8), scalar(30.0), scalar(-1.0)
    columns, kinds = [3, 2, 1, 0, 6, 7, -1, -1], ([0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 3, 1, 1])
    together = partners_of(columns, 8, kinds)
    zero, one, some = slice(0, 4), [4, 5, 6], [4, 6, 7]
    apart = info_nce(a[zero], b[zero], s, partners_of(columns[:4], 4))
    apart = apart + info_nce(a[one], b[some], s, partners_of([1, 2, -1], 3))
    check(info_nce(a, b, s, together, tile=tile), apart, a, b, s)
    apart = pairwise_sigmoid(a[zero], b[zero], s, bias, partners_of(columns[:4], 4))
    apart = apart + pairwise_sigmoid(a[one], b[some], s, bias, partners_of([1, 2, -1], 3))
    check(pairwise_sigmoid(a, b, s, bias, together, tile=tile), apart, a, b, s, bias)


def test_scores_of_single_precision_keep_their_differences() -> None:
    """At the largest scale, scores lie 200 apart: sums must neither overflow nor vanish. Autocast must not round them."""
    torch.manual_seed(0)
    a, b = unit(64, 4).detach(), unit(64, 4).detach()
    b[:8] = -a[:8]  # partners that are as far apart as can be
    exact = info_nce(a, b, scalar(100.0), partners_of(list(range(64)), 64))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = info_nce(a.float(), b.float(), scalar(100.0).float(), partners_of(list(range(64)), 64), tile=10)
    assert exact > 8 * 2 * 150
    assert math.isclose(rounded.item(), exact.item(), rel_tol=1e-5)


def test_gradients_are_handed_out_once() -> None:
    a = unit(3, 4)
    loss = info_nce(a, unit(3, 4), scalar(1.0), partners_of([0, 1, 2], 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_of_a_sample_drawn_twice_the_same_one_counts_on_any_ranks() -> None:
    """Bins 0 and 1 hold sample 7; with dropout they embed it differently."""
    bins: list[dict[str, tuple[int, ...]]] = [{"s/image": (5, 7)}, {"s/image": (7, 8)}, {"s/image": (9,)}, {}]

    def chosen(numbers: list[list[int]]) -> set[tuple[int, int]]:
        """(bin, sample) of the candidates."""
        roster = Roster([[bins[number] for number in rank] for rank in numbers], numbers)
        found = set()
        for rank, rows in enumerate(Candidates.of("s/image", roster).rows):
            entries = [(number, sample) for number in numbers[rank] for sample in bins[number].get("s/image", ())]
            found |= {entries[row] for row in rows}
        return found

    assert chosen([[0, 1, 2, 3]]) == {(0, 5), (0, 7), (1, 8), (2, 9)}
    for numbers in ([[1, 3], [0, 2]], [[3], [2], [1], [0]], [[1, 0], [2, 3]]):
        assert chosen(numbers) == chosen([[0, 1, 2, 3]])
