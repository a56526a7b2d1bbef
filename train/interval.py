"""What happened since the last line of metrics: sums while steps run, one line when they are read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmctx.datasets.shards.contents import REASONS
from mmctx.pack import TOKEN_KINDS, PackedBatch
from mmctx.train.checkpoints.state import TrainerState
from mmctx.train.sums import Muster, Sums
from mmctx.train.utilisation import Utilisation


@dataclass
class Interval:
    """Sums since the last logged step; device tensors are only read when a line is written."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
    grad_norm: Tensor | None = None
    tokens: int = 0
    samples: int = 0
    by_modality: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    bins: int = 0
    steps: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    newest: list[tuple[int, PackedBatch]] = field(default_factory=list)  # (bin number, batch) of the last step
    data_wait: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(
        self,
        bins: Sequence[tuple[int, PackedBatch]],
        muster: Muster,
        totals: Mapping[str, Tensor],
        grad_norm: Tensor,
        flops: int,
    ) -> None:
        """One more step.

        Args:
            bins: this rank's, numbered.
            muster: what the whole step held.
            totals: this rank's share of each objective's loss.
            grad_norm: of the whole step, on the device.
            flops: model FLOPs of `bins`.
        """
        self.steps += 1
        self.newest, self.grad_norm = list(bins), grad_norm
        self.flops += flops
        micro_batches = [batch for _, batch in bins]
        for batch in micro_batches:
            self.by_modality.update(batch.tokens_by_modality)
        self.counts.update(muster.counts)
        self.negatives.update(muster.negatives)
        for name, total in totals.items():
            self.totals[name] = self.totals.get(name, 0) + total
        self.bins += len(micro_batches)
        self.tokens += sum(batch.num_tokens for batch in micro_batches)
        self.samples += sum(batch.num_samples for batch in micro_batches)
        self.skips.update(skip.reason for batch in micro_batches for skip in batch.skips)
        self.left_out.update(skip.reason for batch in micro_batches for skip in batch.left_out)

    def by_reason(self) -> list[int]:
        """Skips, then samples left out, by every reason there is: a list as long on every rank."""
        counts = []
        for counter in (self.skips, self.left_out):
            known = [counter[reason] for reason in REASONS]
            counts += [*known, counter.total() - sum(known)]
        return counts

    @staticmethod
    def add_reasons(counts: Sequence[int], skips: dict[str, int], left_out: dict[str, int]) -> None:
        """Adds what `by_reason` gave, summed over the ranks, to the run's totals."""
        for number, count in enumerate(counts):
            which, place = divmod(number, len(REASONS) + 1)
            if count:
                reason, total = (*REASONS, "other")[place], (skips, left_out)[which]
                total[reason] = total.get(reason, 0) + count

    def finish(
        self,
        sums: Sums,
        state: TrainerState,
        weights: Mapping[str, float],
        bin_tokens: int,
        utilisation: Utilisation,
    ) -> dict[str, Any]:
        """The line of metrics, over all ranks, and the run's totals brought up to date: the only place that waits for the device.

        Args:
            sums: of this rank.
            state: of the run; its tokens, samples, skips and seconds grow.
            weights: of the objectives.
            bin_tokens: that a bin holds at most.
            utilisation: what the devices can do.
        """
        modalities = [self.by_modality[name] for name in TOKEN_KINDS]
        mine = [self.tokens, self.samples, self.bins, self.flops, *modalities, *self.by_reason()]
        tokens, samples, bins, flops, *rest = sums.of_batches(mine)
        modalities, by_reason = rest[: len(TOKEN_KINDS)], rest[len(TOKEN_KINDS) :]
        state.tokens += tokens
        state.tokens_by_modality = {
            name: state.tokens_by_modality.get(name, 0) + count
            for name, count in zip(TOKEN_KINDS, modalities, strict=True)
        }
        state.samples += samples
        self.add_reasons(by_reason, state.skips, state.left_out)
        totals = sums.of_losses(torch.stack([self.totals[name].double() for name in self.counts]))
        counts = self.counts
        assert self.grad_norm is not None
        seconds = time.perf_counter() - self.started
        state.train_seconds += seconds
        means = {n: total / count if count else None for (n, count), total in zip(counts.items(), totals, strict=True)}
        return {
            "step": state.step,
            "loss": sum(weights[name] * mean for name, mean in means.items() if mean is not None),
            **{f"loss/{name}": mean for name, mean in means.items()},
            **{f"negatives/{n}": self.negatives[n] / counts[n] if counts[n] else None for n in self.negatives},
            "grad_norm": float(self.grad_norm),
            "skipped_steps": state.guard.skipped,
            "tokens": state.tokens,
            **{f"tokens/{name}": count for name, count in state.tokens_by_modality.items()},
            "samples": state.samples,
            "tokens_per_s": tokens / seconds,
            "samples_per_s": samples / seconds,
            "fill": tokens / (bins * bin_tokens),
            "data_wait": self.data_wait / seconds,
            **utilisation.line(flops / seconds, sums.gather),
            "batch_fingerprint": sums.fingerprint(self.newest),
            "skipped": state.skipped,
            **{f"skipped/{reason}": count for reason, count in state.skips.items()},
            **{f"left_out/{reason}": count for reason, count in state.left_out.items()},
        }
