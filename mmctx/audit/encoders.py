"""Items of one batch must not see each other inside their encoder: clips are laid end to end, pictures share a batch.

Shapes: I items, R embeddings of all of them, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmctx.audit.differences import Differences, by_document, changed
from mmctx.audit.family import narrow
from mmctx.audit.gradients import GRADIENT, VALUES, item_sizes, random_direction, with_gradients
from mmctx.audit.observe import Subject
from mmctx.audit.perturb import MEDIA_PARTS, perturb_items
from mmctx.audit.report import AuditReport, Blind, Leak, Mode, Place
from mmctx.pack import MediaBatch


class EncoderAudit:
    """One encoder and its items in one mode. Here items stand in the place of documents.

    Args:
        subject: model and batch.
        kind: of the items.
        mode: for the report.
        report: that everything goes into.
    """

    def __init__(self, subject: Subject, kind: str, mode: Mode, report: AuditReport) -> None:
        self.subject, self.kind, self.mode, self.report = subject, kind, mode, report
        self.media = subject.batch.media[kind]
        counts = torch.tensor(self.media.num_tokens)
        self.item_of = torch.repeat_interleave(torch.arange(len(counts)), counts).to(subject.device)  # (R,)
        self.observed = f"embeddings of another {kind}"
        self.observed_gradient = f"{VALUES[kind]} of another {kind}"

    @cached_property
    def base(self) -> Tensor:
        """(R, D) embeddings of the items as they are."""
        return self._encode(self.media).detach()

    @cached_property
    def graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (R, D), the values below them, and a random direction (R, D)."""
        batch, values = with_gradients(self.subject.batch)
        rows = self._encode(batch.media[self.kind])
        return rows, values[self.kind], random_direction(rows, self.subject.seed)

    def change(self, items: Sequence[int]) -> None:
        """Perturbs some items and looks at the embeddings of the others."""
        part, what = MEDIA_PARTS[self.kind], self.observed
        differences = self._changes(items, tell_blind=True)
        for victim, size in self._count(part, what, differences):
            source = narrow(
                nearest_first(items, victim),
                lambda some, victim=victim: self._changes(some).size(what, victim) is not None,
            )
            self._add(part, what, source, victim, size)

    def differentiate(self, items: Sequence[int]) -> None:
        """Asks the embeddings of some items whether they depend on others."""
        what = self.observed_gradient
        for source, size in self._count(GRADIENT, what, self._gradients(items)):
            victim = narrow(
                nearest_first(items, source),
                lambda some, source=source: self._gradients(some).size(what, source) is not None,
            )
            self._add(GRADIENT, what, source, victim, size)

    def _encode(self, media: MediaBatch) -> Tensor:
        torch.manual_seed(self.subject.seed)
        encoder: Any = self.subject.model.encoders[self.kind]
        return encoder(media)

    def _changes(self, items: Sequence[int], tell_blind: bool = False) -> Differences:
        rows = self._encode(perturb_items(self.kind, self.media, items)).detach()
        moved = by_document(changed(self.base, rows), self.base - rows, self.item_of)
        for item in sorted(set(items) - moved.keys()) if tell_blind else ():
            self.report.add_blind(Blind(self.mode, MEDIA_PARTS[self.kind], self.observed, self._place(item)))
        out, own = Differences(), set(items)
        others = len(self.media.num_tokens) - len(own)
        out.add(self.observed, others, {item: size for item, size in moved.items() if item not in own})
        return out

    def _gradients(self, items: Sequence[int]) -> Differences:
        asked = torch.zeros(len(self.media.num_tokens), dtype=torch.bool)
        asked[list(items)] = True
        rows, values, direction = self.graph
        weights = direction * asked.to(rows.device)[self.item_of][:, None]
        (grad,) = torch.autograd.grad(rows, values, weights, retain_graph=True, allow_unused=True)
        out = Differences()
        if grad is not None:
            sizes = item_sizes(self.media, grad)
            found = {item: size for item, size in enumerate(sizes) if size != 0 and not asked[item]}
            out.add(self.observed_gradient, len(sizes) - len(items), found)
        return out

    def _count(self, perturbation: str, observed: str, differences: Differences) -> list[tuple[int, float]]:
        """Puts a pass into the report; returns the items, with sizes, whose leak is to be traced."""
        found = differences.found.get(observed, {})
        self.report.count(self.mode, perturbation, observed, differences.comparisons.get(observed, 0), found.values())
        return [(item, found[item]) for item in self.report.worth_tracing(self.mode, perturbation, observed, found)]

    def _add(self, perturbation: str, observed: str, source: int, victim: int, size: float) -> None:
        leak = Leak(self.mode, perturbation, observed, self._place(source), self._place(victim), size)
        self.report.add_leak(leak)

    def _place(self, item: int) -> Place:
        owned = self.subject.owned
        return owned.place(owned.holders(self.kind)[item][0].document)


def nearest_first(items: Sequence[int], item: int) -> list[int]:
    """Items by their distance from another one."""
    return sorted(items, key=lambda other: abs(other - item))
