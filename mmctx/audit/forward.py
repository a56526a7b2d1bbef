"""Perturb some documents, and nothing of the others may change by a single bit: not their hidden states, embeddings or losses.

Shapes are the same in both runs, so every kernel does the same arithmetic on the same numbers: exactly equal is the right demand.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmctx.audit.differences import SHARED, Differences, by_document, changed, in_spans, largest
from mmctx.audit.family import narrow
from mmctx.audit.observe import Observation, Subject
from mmctx.audit.perturb import Perturbed, Sweep
from mmctx.audit.report import AuditReport, Blind, Leak, Mode

PAST = "its own past"
"""What is observed of a causal document before the position that was changed."""


class ForwardAudit:
    """Perturbations of one batch in one mode.

    Args:
        subject: model and batch.
        base: what the model makes of the batch as it is.
        mode: for the report.
        report: that everything goes into.
    """

    def __init__(self, subject: Subject, base: Observation, mode: Mode, report: AuditReport) -> None:
        self.subject, self.base, self.mode, self.report = subject, base, mode, report
        self.moved: dict[tuple[str, str], bool] = {}  # (perturbation, observed): whether any perturbed document moved

    def run_pass(self, sweep: Sweep, units: Sequence[int], number: int) -> None:
        """Perturbs some units of a sweep, compares, and traces what leaked to one of them."""
        perturbed = sweep.perturb(units, number)
        seen = self._observe(sweep, perturbed)
        self._require_motion(sweep, perturbed, seen)
        differences = self._compare(perturbed, seen)
        for observed, found in differences.found.items():
            self.report.count(self.mode, sweep.name, observed, differences.comparisons[observed], found.values())
            for victim in self.report.worth_tracing(self.mode, sweep.name, observed, found):
                self._trace(sweep, units, number, observed, victim, found[victim])

    def finish(self) -> None:
        """Reports what no perturbation at all has moved, though some must have."""
        for (perturbation, observed), moved in self.moved.items():
            if not moved:
                self.report.add_blind(Blind(self.mode, perturbation, observed, None))

    def _observe(self, sweep: Sweep, perturbed: Perturbed) -> Observation:
        known = self.base.hidden if sweep.name == "label" else None  # labels enter no hidden state
        return self.subject.observe(perturbed.batch, known)

    def _trace(self, sweep: Sweep, units: Sequence[int], number: int, observed: str, victim: int, size: float) -> None:
        """Finds one perturbed unit that reaches the victim by itself, the nearest first."""
        owned = self.subject.owned
        place = None if victim == SHARED else owned.place(victim)
        if observed == PAST:
            self.report.add_leak(Leak(self.mode, sweep.name, observed, place, place, size))
            return

        def reach(some: Sequence[int]) -> float | None:
            perturbed = sweep.perturb(some, number)
            return self._compare(perturbed, self._observe(sweep, perturbed)).size(observed, victim)

        nearest_first = sorted(units, key=lambda unit: abs(sweep.documents[unit] - victim))
        unit = narrow(nearest_first, lambda some: reach(some) is not None)
        source = owned.place(sweep.documents[unit])
        self.report.add_leak(Leak(self.mode, sweep.name, observed, source, place, reach([unit]) or size))

    def _compare(self, perturbed: Perturbed, seen: Observation) -> Differences:
        out, base, owned = Differences(), self.base, self.subject.owned
        untouched = [d for d in range(len(owned.lengths)) if d not in perturbed.documents]
        if seen.hidden is not base.hidden:
            self._compare_hidden(out, perturbed, seen.hidden, len(untouched))
        for name, embeddings in base.pooled.items():
            rows = changed(embeddings, seen.pooled[name])
            owners = torch.tensor(owned.pooled[name], device=rows.device)
            found = by_document(rows, embeddings - seen.pooled[name], owners)
            count = sum(owner not in perturbed.documents for owner in owned.pooled[name])
            out.add("embedding", count, {d: size for d, size in found.items() if d not in perturbed.documents})
        losses = {d: loss for d, loss in base.losses.items() if d not in perturbed.documents}
        out.add("loss", len(losses), {d: abs(a - b) for d, a in losses.items() if a != (b := seen.losses[d])})
        with torch.no_grad():
            before = self.subject.shared_losses(base.hidden, self.subject.batch, untouched)
            after = self.subject.shared_losses(seen.hidden, perturbed.batch, untouched)
        for name, loss in before.items():
            same = torch.equal(loss, after[name])
            out.add("shared loss", 1, {} if same else {SHARED: largest(loss, after[name])})
        return out

    def _compare_hidden(self, out: Differences, perturbed: Perturbed, hidden: Tensor, num_untouched: int) -> None:
        wrong = changed(self.base.hidden, hidden) & ~self._may_move(perturbed)
        found = by_document(wrong, self.base.hidden - hidden, self.subject.document_of)
        past = {d: size for d, size in found.items() if d in perturbed.documents}
        out.add("hidden states", num_untouched, {d: size for d, size in found.items() if d not in past})
        if num_causal := sum(self.subject.owned.causal[d] for d in perturbed.documents):
            out.add(PAST, num_causal, past)

    def _may_move(self, perturbed: Perturbed) -> Tensor:
        """(T,) bool: where a change may show: all of a bidirectional document, a causal one from the change on."""
        owned = self.subject.owned
        spans = [self._span(d, first) for d, first in perturbed.documents.items()]
        return in_spans(spans, owned.num_tokens, self.subject.device)

    def _span(self, document: int, first: int) -> tuple[int, int]:
        owned, start = self.subject.owned, self.subject.owned.starts[document]
        return max(first, start) if owned.causal[document] else start, start + owned.lengths[document]

    def _require_motion(self, sweep: Sweep, perturbed: Perturbed, seen: Observation) -> None:
        """What was perturbed must itself have moved: a check that sees nothing would pass anything."""
        owned = self.subject.owned
        for document in perturbed.labels_of:
            if self.base.losses[document] == seen.losses[document]:
                self.report.add_blind(Blind(self.mode, sweep.name, "loss", owned.place(document)))
        if not perturbed.must_move:
            return
        moved = changed(self.base.hidden, seen.hidden).tolist()
        at_changes = {p for _, positions in perturbed.must_move for p in positions}
        for document, positions in perturbed.must_move:
            if not any(moved[p] for p in positions):
                self.report.add_blind(Blind(self.mode, sweep.name, "hidden states", owned.place(document)))
        for document, first in perturbed.documents.items():
            elsewhere = [p for p in range(*self._span(document, first)) if p not in at_changes]
            if elsewhere:
                self._note_motion(sweep.name, "hidden states", any(moved[p] for p in elsewhere))
        for name, embeddings in self.base.pooled.items():
            rows = changed(embeddings, seen.pooled[name]).tolist()
            own = [row for row, owner in zip(rows, owned.pooled[name], strict=True) if owner in perturbed.documents]
            if own:
                self._note_motion(sweep.name, "embedding", any(own))

    def _note_motion(self, perturbation: str, observed: str, moved: bool) -> None:
        self.moved[perturbation, observed] = moved or self.moved.get((perturbation, observed), False)
