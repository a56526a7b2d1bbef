"""AdaLoRA's budget (Zhang et al. 2023): which entries of the diagonals stay, chosen by peft's `RankAllocator` as the run goes on.

Importance is judged from weights and gradients of each step, by two means that are kept in the optimizer's state, so that a checkpoint has
them. In the last `settle` steps the entries that are zero stay zero; no other state is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmctx.tuning.apply import ADAPTER, peft_config
from mmctx.tuning.config import AdaLoraTuning

_MEAN, _SPREAD = "importance", "uncertainty"


class RankBudget:
    """Takes entries away, and keeps the outer matrices near orthogonal.

    Args:
        model: tuned, not wrapped, on its device.
        optimizer: of its parameters.
        tuning: how.
        steps: of the run.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, tuning: AdaLoraTuning, steps: int) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        self._model, self._optimizer, self._tuning, self._steps = model, optimizer, tuning, steps
        self._allocator: Any = RankAllocator(model, peft_config(tuning, [], steps), ADAPTER)
        named = [(name, p) for name, p in model.named_parameters() if f".{ADAPTER}" in name and ".lora_" in name]
        self._parameters = dict(named)
        self._outer = [(name, p) for name, p in named if ".lora_E." not in name]
        for name, parameter in named:
            state = optimizer.state.get(parameter, {})
            if _MEAN in state:
                self._allocator.exp_avg_ipt[name], self._allocator.exp_avg_unc[name] = state[_MEAN], state[_SPREAD]
                self._allocator.ipt[name] = torch.zeros_like(parameter)
        self._zeros = self._find_zeros()

    def regularise(self) -> None:
        """Adds the gradient of `orthogonality` times the mean of `|P P^T - I|` over all outer matrices; on all ranks the same."""
        trained = [(name, p) for name, p in self._outer if p.requires_grad]
        if not trained or not self._tuning.orthogonality:
            return
        with torch.enable_grad():
            squares = [p @ p.T if ".lora_A." in name else p.T @ p for name, p in trained]
            off = [torch.linalg.matrix_norm(s - torch.eye(len(s), device=s.device, dtype=s.dtype)) for s in squares]
            penalty = self._tuning.orthogonality * torch.stack(off).mean()
        parameters = [p for _, p in trained]
        for parameter, gradient in zip(parameters, torch.autograd.grad(penalty, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    @torch.no_grad()
    def allocate(self, step: int, norm: Tensor) -> None:
        """To be called after the optimizer's step, with the gradients still there.

        Args:
            step: counted from 1.
            norm: of the gradients; where it is not finite, the step was left out and tells nothing.
        """
        if not bool(torch.isfinite(norm)) or any(p.grad is None for p in self._parameters.values()):
            return
        last = self._steps - self._tuning.settle
        if step > last:
            for parameter, zeros in self._zeros.items():
                parameter.masked_fill_(zeros, 0)
            return
        self._allocator.update_ipt(self._model)
        budget, is_due = self._allocator.budget_schedule(step)
        if (is_due or step == last) and budget < self._allocator.init_bgt:
            self._allocator.mask_to_budget(self._model, budget)
            self._zeros = self._find_zeros()
        for name, parameter in self._parameters.items():
            if state := self._optimizer.state.get(parameter):  # an optimizer that finds a state takes it for its own
                state[_MEAN], state[_SPREAD] = self._allocator.exp_avg_ipt[name], self._allocator.exp_avg_unc[name]

    @torch.no_grad()
    def _find_zeros(self) -> dict[nn.Parameter, Tensor]:
        return {p: p == 0 for name, p in self._parameters.items() if ".lora_E." in name}
