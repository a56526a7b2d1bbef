"""The gradient of some documents' outputs with respect to everything that belongs to others must be exactly zero.

A gradient sees every position of a document at once, where a perturbation changes a few, and no rounding can hide it: where nothing is
mixed, zeros are multiplied and stay zeros on every kernel, even where its sums depend on the order in which threads finish.

Shapes: T tokens, D width, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mmctx.audit.differences import Differences, by_document, in_spans
from mmctx.audit.family import narrow
from mmctx.audit.observe import Subject
from mmctx.audit.report import AuditReport, Blind, Leak, Mode, Place
from mmctx.pack import MediaBatch, PackedBatch

GRADIENT = "gradient"
FUTURE = "its own future"
"""Positions of a causal document after those that were asked."""
OF_LOSS = "hidden states of a loss"
VALUES = {"image": "pixels", "audio": "frames"}
"""What the values of a modality's items are."""


class GradientAudit:
    """One forward pass of a batch in one mode, and many backward passes through its graph.

    Args:
        subject: model and batch.
        mode: for the report.
        report: that everything goes into.
    """

    def __init__(self, subject: Subject, mode: Mode, report: AuditReport) -> None:
        self.subject, self.mode, self.report, self.owned = subject, mode, report, subject.owned
        self.batch, self.values = with_gradients(subject.batch)

    @cached_property
    def graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, the embeddings below them, and a random direction, (T, D) each.

        Made when first asked for: layers that count along (running statistics) forbid a backward pass after another forward pass.
        """
        hidden, embeddings = self.subject.run(self.batch)
        return hidden, embeddings, random_direction(hidden, self.subject.seed)

    def run_pass(self, documents: Sequence[int], number: int) -> None:
        """Looks at what the hidden states and losses of some documents depend on.

        Of causal documents only the first tokens, up to a random one, are asked: they must not depend on those that follow.
        """
        rng = np.random.default_rng((self.subject.seed, number))
        spans = zip(self.owned.starts, self.owned.lengths, self.owned.causal, strict=True)
        ends = [start + (int(rng.integers(1, n + 1)) if causal else n) for start, n, causal in spans]
        self._report(self._inputs, documents, ends)
        self.run_loss_pass(documents)

    def run_loss_pass(self, documents: Sequence[int]) -> None:
        """Looks at what the losses over some documents depend on."""
        self._report(self._losses, documents, [])

    def _report(self, look: Callable[..., Differences], documents: Sequence[int], ends: Sequence[int]) -> None:
        differences = look(documents, ends, tell_blind=True)
        for observed, found in differences.found.items():
            self.report.count(self.mode, GRADIENT, observed, differences.comparisons[observed], found.values())
            for source in self.report.worth_tracing(self.mode, GRADIENT, observed, found):
                place = self.owned.place(source)
                victim = place if observed == FUTURE else self._trace(look, documents, ends, observed, source)
                self.report.add_leak(Leak(self.mode, GRADIENT, observed, place, victim, found[source]))

    def _trace(
        self,
        look: Callable[..., Differences],
        documents: Sequence[int],
        ends: Sequence[int],
        observed: str,
        source: int,
    ) -> Place | None:
        """The document, among those that were asked, that depends on the source by itself; None if it takes several."""

        def reaches(some: Sequence[int]) -> bool:
            return look(some, ends).size(observed, source) is not None

        victim = narrow(sorted(documents, key=lambda d: abs(d - source)), reaches)
        return self.owned.place(victim) if reaches([victim]) else None

    def _inputs(self, documents: Sequence[int], ends: Sequence[int], tell_blind: bool = False) -> Differences:
        """Gradients of the documents' hidden states with respect to input embeddings, pixels and frames."""
        out, owned = Differences(), self.owned
        starts = owned.starts
        asked = in_spans([(starts[d], ends[d]) for d in documents], owned.num_tokens, self.subject.device)
        hidden, embeddings, direction = self.graph
        grad, *of_values = torch.autograd.grad(
            hidden,
            [embeddings, *self.values.values()],
            direction * asked[:, None],
            retain_graph=True,
            allow_unused=True,
        )
        assert grad is not None  # the trunk's input is part of its output
        nonzero = grad.ne(0).any(dim=-1)  # NaN is not zero either
        found = by_document(nonzero & ~self._may_matter(documents, ends), grad, self.subject.document_of)
        future = {d: size for d, size in found.items() if d in set(documents)}
        out.add("embeddings", len(owned.lengths) - len(documents), {d: s for d, s in found.items() if d not in future})
        if num_causal := sum(owned.causal[d] for d in documents):
            out.add(FUTURE, num_causal, future)
        blind = set(self.subject.document_of[asked & ~nonzero].tolist())
        for kind, value_grad in zip(self.values, of_values, strict=True):
            if (
                value_grad is not None
            ):  # an encoder that lets no gradient through leaks none; perturbations still look at it
                blind |= self._items(out, kind, value_grad, set(documents), ends)
        if tell_blind:
            for document in sorted(blind):
                self.report.add_blind(Blind(self.mode, GRADIENT, "embeddings", owned.place(document)))
        return out

    def _may_matter(self, documents: Sequence[int], ends: Sequence[int]) -> Tensor:
        """(T,) bool: positions that the asked ones may depend on; ends of bidirectional documents are their last tokens."""
        spans = [(self.owned.starts[d], ends[d]) for d in documents]
        return in_spans(spans, self.owned.num_tokens, self.subject.device)

    def _items(
        self, out: Differences, kind: str, grad: Tensor, asked: Collection[int], ends: Sequence[int]
    ) -> set[int]:
        """Items that no asked document holds; returns documents that hold one, have been asked behind it, and do not depend on it."""
        sizes = item_sizes(self.batch.media[kind], grad)
        blind, found, num_foreign = set(), {}, 0
        for item, places in self.owned.holders(kind).items():
            holders = [h for h in places if h.document in asked]
            if not holders:
                num_foreign += 1
                if sizes[item] != 0:
                    found[places[0].document] = sizes[item]
            elif sizes[item] == 0:
                blind |= {h.document for h in holders if h.first < ends[h.document]}
        out.add(VALUES[kind], num_foreign, found)
        return blind

    def _losses(self, documents: Sequence[int], ends: Sequence[int], tell_blind: bool = False) -> Differences:
        """Gradients of the losses over some documents with respect to the hidden states of the others."""
        out, owned, asked = Differences(), self.owned, frozenset(documents)
        leaf = self.graph[0].detach().requires_grad_()
        for name, loss in self.subject.all_losses(leaf, self.batch, asked).items():
            (grad,) = torch.autograd.grad(loss, leaf)
            found = by_document(grad.ne(0).any(dim=-1), grad, self.subject.document_of)
            foreign = {d: size for d, size in found.items() if d not in asked}
            out.add(OF_LOSS, len(owned.lengths) - len(asked), foreign)
            mute = [d for d in asked - found.keys() if owned.objectives[d] == name and owned.labelled[d]]
            for document in sorted(mute) if tell_blind else ():
                self.report.add_blind(Blind(self.mode, GRADIENT, OF_LOSS, owned.place(document)))
        return out


def with_gradients(batch: PackedBatch) -> tuple[PackedBatch, dict[str, Tensor]]:
    """The batch with pixels and frames as floats that collect gradients, and these."""
    values = {
        kind: (m.values if m.values.is_floating_point() else m.values.float()).detach().requires_grad_()
        for kind, m in batch.media.items()
    }
    media = {kind: replace(m, values=values[kind]) for kind, m in batch.media.items()}
    return replace(batch, media=media), values


def random_direction(like: Tensor, seed: int) -> Tensor:
    """Normal numbers of the shape, type and place of `like`; the same on every device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def item_sizes(media: MediaBatch, grad: Tensor) -> list[float]:
    """Largest magnitude of the gradient of each item's values."""
    magnitudes = grad.abs().view(len(grad), -1).amax(dim=1)  # (rows of values,)
    ends = list(accumulate(media.lengths))
    return [float(magnitudes[end - n : end].max()) for end, n in zip(ends, media.lengths, strict=True)]
