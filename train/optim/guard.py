"""Steps that are not taken: those whose loss or gradients are not finite, or whose gradients are far beyond the usual (loss spikes).

The decision is made on the device and, by AdamW's kernel, carried out there: the host reads it one step later, when it is long known. It is
made from the global loss and gradient norm alone, so all ranks agree, and a restart decides the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mmctx.config import StrictModel
from mmctx.errors import GuardError
from mmctx.train.optim.optimizer import TAKES_FOUND_INF


class GuardConfig(StrictModel):
    """Which steps are not taken, and how many of them a run bears."""

    max_skips: int = Field(default=20, ge=0)
    """Steps in all; one more stops the run."""
    spike_factor: float | None = Field(default=None, gt=1)
    """A step is left out if its gradient norm exceeds so many times the running mean; null looks only for what is not finite."""
    window: int = Field(default=100, ge=1)
    """Steps that the running mean looks back on: a plain mean over the first ones, then an exponential one. Until so many of a stage have
    been taken, no step counts as a spike."""


@dataclass
class GuardState:
    """What a checkpoint must hold for a restart to decide as the run would have.

    Attributes:
        skipped: steps left out so far.
        seen: steps that the mean has seen, `window` at most.
        mean: of the gradient norm.
    """

    skipped: int = 0
    seen: int = 0
    mean: float = 0.0


@dataclass
class _Pending:
    """One decision on its way to the host: bad, loss, norm, mean; and how to name the batch, should it come to that."""

    step: int
    values: Tensor  # (4,) float64 on the host, valid once `done` is
    done: torch.cuda.Event | None
    name_batch: Callable[[], str]


class Guard:
    """Decides about each step, and reports those that were left out.

    Args:
        config: what is borne.
        state: of an earlier sitting, which goes on changing here.
        device: where gradients are.
        report: called with the ledger's line of each step left out, one step later.
    """

    def __init__(
        self, config: GuardConfig, state: GuardState, device: torch.device, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.config, self.state, self._report = config, state, report
        self._mean = torch.tensor(state.mean, dtype=torch.float32).to(device, non_blocking=True)
        self._seen = torch.tensor(state.seen, dtype=torch.float32).to(device, non_blocking=True)
        self._pending: _Pending | None = None

    @torch.no_grad()
    def step(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor, step: int, name_batch: Callable[[], str]
    ) -> None:
        """Takes the optimizer's step, or leaves it out.

        Args:
            optimizer: not wrapped; with the gradients of the step.
            loss: the global batch's, the same on all ranks.
            norm: of the global gradient, before clipping.
            step: counted from 1.
            name_batch: gives the batch's fingerprint; called one step later, on all ranks, and only if this one is left out.
        """
        bad = self._judge(loss, norm)
        values = torch.stack([bad.double(), loss.double(), norm.double(), self._mean.double()])
        self._learn(bad, norm)
        apply(optimizer, bad)
        self.settle()
        values = values.to("cpu", non_blocking=True)
        done = None
        if norm.is_cuda:
            done = torch.cuda.Event()
            done.record()
        self._pending = _Pending(step, values, done, name_batch)

    def _judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if self.config.spike_factor is not None:
            bad |= (self._seen >= self.config.window) & (norm > self.config.spike_factor * self._mean)
        return bad

    def _learn(self, bad: Tensor, norm: Tensor) -> None:
        """The mean takes up the norm of a step that is taken."""
        seen = (self._seen + 1).clamp(max=self.config.window)
        self._mean = torch.where(bad, self._mean, self._mean + (norm.float() - self._mean) / seen)
        self._seen = torch.where(bad, self._seen, seen)

    def settle(self) -> None:
        """Reads the decision of the last step, if it is still open. All ranks call it together.

        Raises:
            GuardError: more steps were left out than the run bears.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.done is not None:
            pending.done.synchronize()
        if not bool(pending.values[0] != 0):
            return
        loss, norm, mean = pending.values[1:].tolist()
        reason = "spike" if _finite(loss) and _finite(norm) else "not_finite"
        self.state.skipped += 1
        line = {"step": pending.step, "event": "step_left_out", "reason": reason, "loss": _json(loss)}
        line |= {"grad_norm": _json(norm), "mean_grad_norm": mean, "batch_fingerprint": pending.name_batch()}
        self._report(line)
        if self.state.skipped > self.config.max_skips:
            raise GuardError(
                f"step {pending.step} was left out ({reason}: loss {loss:.4g}, gradient norm {norm:.4g}, usually {mean:.4g}): "
                f"{self.state.skipped} steps so far, more than train.guard.max_skips={self.config.max_skips} allows. skips.jsonl names the "
                "batch of each, `mmctx replay` rebuilds them; lower train.optimizer.lr, mend the data, or raise the budget."
            )

    def forget(self) -> None:
        """What is usual changes, as when other modules are trained from now on: the mean starts anew."""
        self._mean, self._seen = torch.zeros_like(self._mean), torch.zeros_like(self._seen)

    def save(self) -> GuardState:
        """The state as of now, for a checkpoint; waits for the device."""
        self.settle()
        self.state.mean, self.state.seen = float(self._mean), int(self._seen)
        return self.state


def apply(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Takes the step unless `bad`, a bool tensor on the device. Fused AdamW reads it there; of other optimizers the host waits for it."""
    if isinstance(optimizer, TAKES_FOUND_INF) and optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(bad):
        optimizer.step()


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _json(value: float) -> float | None:
    """JSON knows neither nan nor infinity."""
    return value if _finite(value) else None
