"""Steps that are left out: nothing of them is applied, each is reported, too many stop the run, and a restart decides the same."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from mmctx.errors import GuardError
from mmctx.train.optim.config import AdafactorConfig, AdamWConfig, MuonConfig, OptimizerConfig
from mmctx.train.optim.guard import Guard, GuardConfig, GuardState
from mmctx.train.optim.optimizer import build_optimizer

KINDS = [AdamWConfig(), AdafactorConfig(), MuonConfig()]
CPU = torch.device("cpu")


class Steps:
    """A model under a guard, fed gradients of chosen norms."""

    def __init__(
        self, config: GuardConfig, optimizer: OptimizerConfig | None = None, state: GuardState | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"trunk": nn.ModuleDict({"a": nn.Linear(4, 4)})})
        self.optimizer = build_optimizer(self.model, optimizer or AdamWConfig())
        self.lines: list[dict[str, Any]] = []
        self.guard = Guard(config, state or GuardState(), CPU, self.lines.append)

    def step(self, number: int, norm: float = 1.0, loss: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        size = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad *= norm / size
        self.guard.step(self.optimizer, torch.tensor(loss), torch.tensor(norm), number, lambda: f"batch {number}")

    def everything(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [p.detach().clone() for p in self.model.parameters()] + [
            copy.deepcopy(torch.as_tensor(m)) for m in moments
        ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", KINDS, ids=lambda config: config.kind)
@pytest.mark.parametrize(
    "bad", [{"norm": float("nan")}, {"norm": float("inf")}, {"loss": float("nan")}, {"norm": 40.0}], ids=str
)
def test_a_bad_step_leaves_weights_and_moments_alone(optimizer: OptimizerConfig, bad: dict[str, float]) -> None:
    steps = Steps(GuardConfig(spike_factor=10, window=3), optimizer)
    for number in (1, 2, 3):
        steps.step(number)
    before = steps.everything()
    steps.step(4, **bad)
    assert same(steps.everything(), before)
    assert not steps.lines
    steps.step(5)  # one step late
    assert not same(steps.everything(), before)
    (line,) = steps.lines
    reason = "spike" if bad.get("norm") == 40 else "not_finite"
    assert (line["step"], line["reason"], line["batch_fingerprint"]) == (4, reason, "batch 4")
    assert line["mean_grad_norm"] == pytest.approx(1.0)
    json.dumps(line, allow_nan=False)


def test_no_step_is_a_spike_before_the_window_is_full() -> None:
    steps = Steps(GuardConfig(spike_factor=2, window=3))
    for number, norm in enumerate([1.0, 50.0, 1.0], 1):
        steps.step(number, norm)
    steps.guard.settle()
    assert not steps.lines
    assert steps.guard.save().mean == pytest.approx(52 / 3)
    steps.step(4, 40.0)
    steps.guard.settle()
    assert len(steps.lines) == 1
    assert steps.guard.save() == GuardState(skipped=1, seen=3, mean=pytest.approx(52 / 3))


def test_the_budget_stops_the_run_and_says_why() -> None:
    steps = Steps(GuardConfig(max_skips=1))
    steps.step(1, float("inf"))
    steps.step(2, float("nan"))
    assert len(steps.lines) == 1
    with pytest.raises(
        GuardError, match=r"step 2 was left out \(not_finite.*2 steps so far, more than train\.guard\.max_skips=1"
    ):
        steps.guard.settle()


def test_a_restart_decides_as_the_run_would_have() -> None:
    config = GuardConfig(spike_factor=1.2, window=4)
    norms = (1 + torch.rand(60, generator=torch.Generator().manual_seed(1))).tolist()
    whole = Steps(config)
    for number, norm in enumerate(norms[:31]):
        whole.step(number, norm)
    saved = GuardState(**json.loads(json.dumps(vars(whole.guard.save()))))
    again, reported = Steps(config, state=saved), len(whole.lines)
    for number, norm in enumerate(norms[31:], 31):
        whole.step(number, norm)
        again.step(number, norm)
    assert again.guard.save() == whole.guard.save()
    assert again.lines == whole.lines[reported:]
    assert again.lines
