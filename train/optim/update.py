"""From gradients to new weights: learning rate, guard, optimizer, average."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmctx.ranges import timed
from mmctx.train.optim.budget import RankBudget
from mmctx.train.optim.ema import Ema
from mmctx.train.optim.guard import Guard, GuardState
from mmctx.train.optim.learning_rate import learning_rate
from mmctx.train.optim.optimizer import set_groups

if TYPE_CHECKING:
    from mmctx.train.config import RunConfig
    from mmctx.train.stages import Stage


class Update:
    """The last part of a step, the same on all ranks.

    Args:
        config: of the run.
        model: not wrapped, on its device.
        optimizer: of its parameters, not wrapped.
        guard: what an earlier sitting knows of usual gradients; changed as steps are taken.
        average: averaged weights of an earlier sitting.
        report: see `Guard`.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: GuardState,
        average: dict[str, Tensor] | None,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self._train, self._optimizer = config.train, optimizer
        self._steps, self._schedule = config.steps, config.train.schedule.in_steps(config.stages)
        self.lr = 0.0
        self.ema = Ema(model, config.train.ema) if config.train.ema else None
        if self.ema is not None and average is not None:
            self.ema.load(average)
        self.guard_state = guard
        device = next(model.parameters()).device
        tuning = config.train.tune
        self._budget = RankBudget(model, optimizer, tuning, config.steps) if tuning.kind == "adalora" else None
        self._guard = Guard(config.train.guard, guard, device, report) if config.train.guard else None

    def __call__(self, stage: Stage, step: int, loss: Tensor, norm: Tensor, name_batch: Callable[[], str]) -> None:
        """Takes the step, unless the guard objects, and clears the gradients.

        Args:
            stage: that the step belongs to.
            step: counted from 0.
            loss: of the global batch, as all ranks know it.
            norm: of the global gradient, before it was clipped.
            name_batch: see `Guard.step`.
        """
        train = self._train
        self.lr = learning_rate(step, self._steps, train.optimizer.lr, self._schedule) * stage.lr_factor
        set_groups(self._optimizer, train.optimizer, stage.config.train.modules, self.lr)
        with timed("optimizer"):
            if self._guard is None:
                self._optimizer.step()
            else:
                self._guard.step(self._optimizer, loss, norm, step + 1, name_batch)
            if self._budget is not None:
                self._budget.allocate(step + 1, norm)
            self._optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            with timed("ema"):
                self.ema.update(step + 1)

    def regularise(self) -> None:
        """Adds to the gradients what a tuning asks of the weights themselves; before they are clipped."""
        if self._budget is not None:
            self._budget.regularise()

    def begin_stage(self) -> None:
        """To be called before a stage's first step: gradients may be of another size now."""
        if self._guard is not None:
            self._guard.forget()

    def settle(self) -> None:
        """Waits for what is still open of the last step: before a line or a checkpoint is written, on all ranks."""
        if self._guard is not None:
            self._guard.save()
