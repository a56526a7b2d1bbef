"""One optimizer step: a global batch in micro-batches and ranks, whose loss and gradients are those of the whole.

Objectives are of two sorts. Most are sums over documents: each micro-batch adds its part, divided by the count of the whole step.
Similarity compares every embedding of the step with every other, so its loss must wait for all of them. With one micro-batch a rank it
is part of one graph. With several, the step makes two passes (GradCache, Gao et al. 2021):

    embed    every micro-batch, without a graph                     -> embeddings
    compare  all embeddings of all ranks                            -> the loss, and its gradient for each embedding
    train    every micro-batch again, with a graph: each embedding times its gradient joins the losses of the others

Both passes see the same dropout. The second costs what it always does, the first a forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmctx.model import MmctxModel, StepOutputs
from mmctx.objectives import ComparingHalf, Roster
from mmctx.pack import PackedBatch
from mmctx.ranges import timed
from mmctx.train.distribution import without_exchange
from mmctx.train.sums import Muster

Embedded = dict[str, Tensor]
"""What one `ComparingHalf` embedded: `OBJECTIVE/VIEW` -> (P, E), and what is the same for all micro-batches."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One bin, or this rank's part of it.

    Attributes:
        seed: of its dropout, a function of (run, step, bin): no generator state to save, and no dependence on ranks.
        batch: on the host.
    """

    seed: int
    batch: PackedBatch


class GradientStep:
    """Computes the gradients of a global step.

    Args:
        accelerator: of the run.
        model: as wrapped for several processes.
        raw: the same model, unwrapped.
        weights: of the objectives.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, raw: MmctxModel, weights: Mapping[str, float]
    ) -> None:
        self.accelerator, self.model, self.raw, self.weights = accelerator, model, raw, weights

    def __call__(self, micro_batches: Sequence[MicroBatch], muster: Muster) -> dict[str, Tensor]:
        """Adds this rank's gradients to the parameters; over all ranks, those of the global mean loss.

        Args:
            micro_batches: this rank's; as many on every rank.
            muster: of the global step.

        Returns:
            This rank's share of each objective's loss, summed; scalars on the device.
        """
        if len(micro_batches) == 1 or not any(muster.roster.embeds_in(n) for n in range(len(micro_batches))):
            return self._one_pass(micro_batches, muster)
        return self._two_passes(micro_batches, muster)

    def _one_pass(self, micro_batches: Sequence[MicroBatch], muster: Muster) -> dict[str, Tensor]:
        """What is compared is all in the last micro-batch, if there is any."""
        totals: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with self._synchronised(last):
                outputs = self._run(self.model, micro_batch)
                found = {name: loss.total for name, loss in outputs.losses.items()}
                if last:
                    found |= self._compare(outputs.embedded, muster.roster)
                rest = [] if last else [tensor.sum() * 0 for tensor in _tensors(outputs.embedded)]
                self._backward(self._mean(found, muster.counts, rest))
            _add(totals, found)
        return totals

    def _two_passes(self, micro_batches: Sequence[MicroBatch], muster: Muster) -> dict[str, Tensor]:
        with torch.no_grad():
            pieces = [
                self._run(self.raw, micro_batch, embed_only=True).embedded if muster.roster.embeds_in(n) else None
                for n, micro_batch in enumerate(micro_batches)
            ]
        whole = _join([embedded for embedded in pieces if embedded is not None])
        for tensor in _tensors(whole):
            tensor.requires_grad_()
        totals = self._compare(whole, muster.roster)
        self._backward(self._mean(totals, muster.counts, []))
        cache = _Cache(whole)
        for number, micro_batch in enumerate(micro_batches):
            with self._synchronised(number == len(micro_batches) - 1):
                outputs = self._run(self.model, micro_batch)
                found = {name: loss.total for name, loss in outputs.losses.items()}
                self._backward(self._mean(found, muster.counts, cache.take(outputs.embedded)))
            _add(totals, found)
        return totals

    def _run(self, model: Callable[..., Any], micro_batch: MicroBatch, **options: bool) -> StepOutputs:
        torch.manual_seed(micro_batch.seed)
        with timed("rest of the model"):
            return model(micro_batch.batch.to(self.accelerator.device), **options)

    def _backward(self, loss: Tensor) -> None:
        with timed("backward"):
            self.accelerator.backward(loss)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients once, in the last micro-batch's backward pass."""
        return nullcontext() if last else without_exchange(self.model, self.accelerator)

    def _compare(self, embedded: Mapping[str, Embedded], roster: Roster) -> dict[str, Tensor]:
        halves = {name: half for name, half in self.raw.objectives.items() if isinstance(half, ComparingHalf)}
        totals = {}
        for name, half in halves.items():
            with timed(f"loss of {name}"):
                totals[name] = half.compare(embedded[name], roster)
        return totals

    def _mean(self, totals: Mapping[str, Tensor], counts: Mapping[str, int], rest: Sequence[Tensor]) -> Tensor:
        """Weighted sum of means over the whole global step, times the ranks, because DDP averages gradients over them; and what has
        that factor already.
        """
        parts = [self.weights[name] * total / max(counts[name], 1) for name, total in totals.items()]
        scaled = [part * self.accelerator.num_processes for part in parts]
        return torch.stack([*scaled, *rest]).sum()


class _Cache:
    """Gradients of the embeddings of all micro-batches, handed out in their order.

    Args:
        whole: embeddings of all micro-batches end to end, after the backward pass of their comparison.
    """

    def __init__(self, whole: Mapping[str, Embedded]) -> None:
        self._gradients = {
            (objective, name): tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            for objective, embedded in whole.items()
            for name, tensor in embedded.items()
        }
        self._taken = dict.fromkeys(self._gradients, 0)

    def take(self, embedded: Mapping[str, Embedded]) -> list[Tensor]:
        """Scalars whose gradients, for the next micro-batch's embeddings, are those of the comparison."""
        found = []
        for objective, tensors in embedded.items():
            for name, tensor in tensors.items():
                gradient, start = self._gradients[objective, name], self._taken[objective, name]
                if is_view(name):
                    self._taken[objective, name] += len(tensor)
                    gradient = gradient[start : start + len(tensor)]
                else:  # one for all micro-batches: the first takes its gradient
                    self._taken[objective, name] = 1
                    gradient = gradient * (start == 0)
                found.append((tensor * gradient).sum())
        return found


def is_view(name: str) -> bool:
    """Whether this is `OBJECTIVE/VIEW`, embeddings; not something learned that all micro-batches share."""
    return "/" in name


def _join(pieces: Sequence[Mapping[str, Embedded]]) -> dict[str, Embedded]:
    """Embeddings of several micro-batches end to end; what they share, once."""
    whole: dict[str, dict[str, list[Tensor]]] = {}
    for piece in pieces:
        for objective, embedded in piece.items():
            for name, tensor in embedded.items():
                whole.setdefault(objective, {}).setdefault(name, []).append(tensor)
    return {
        objective: {name: torch.cat(parts) if is_view(name) else parts[0] for name, parts in embedded.items()}
        for objective, embedded in whole.items()
    }


def _tensors(embedded: Mapping[str, Embedded]) -> list[Tensor]:
    return [tensor for tensors in embedded.values() for tensor in tensors.values()]


def _add(totals: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, total in found.items():
        totals[name] = totals[name] + total.detach() if name in totals else total.detach()
