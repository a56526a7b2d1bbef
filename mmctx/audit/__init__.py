"""The leak audit: on a model and a batch of real documents, change something of one document and require that no other notices.

    report = audit_batch(model, batch, documents)
    assert report.ok, report.leaks

What is changed: text tokens, patches of pictures, frames of clips, labels. What must not move, by a single bit: hidden states, embeddings
and losses of every other document, and what a causal document holds before the change. And what must be exactly zero: the gradient of a
document's hidden states and losses with respect to all that belongs to others. What was changed must itself move, or the check counts
as blind. Dropout is on, with equal masks. Models with a memory are also read behind another document on a stream's lane.

Which tokens belong to which document is told by the documents, not by the batch or the model: see `ownership`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mmctx.audit.encoders import EncoderAudit
from mmctx.audit.family import every_pair, neighbours, stretches
from mmctx.audit.forward import ForwardAudit
from mmctx.audit.gradients import GradientAudit
from mmctx.audit.lanes import audit_lane
from mmctx.audit.modes import left_as_it_was, other_modes, own_mode, running
from mmctx.audit.observe import Subject
from mmctx.audit.ownership import Ownership
from mmctx.audit.packing import PARTS, mismatches
from mmctx.audit.perturb import sweeps
from mmctx.audit.report import AuditReport, Blind, Check, Leak, Mode, Place
from mmctx.errors import DataError
from mmctx.layer_memory import LayerMemory
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch

__all__ = ["AuditReport", "Blind", "Check", "Leak", "Mode", "Place", "audit_batch", "other_modes", "own_mode"]

Progress = Callable[[str, int, int], None]


def audit_batch(
    model: MmctxModel,
    batch: PackedBatch,
    documents: Sequence[Document] | None = None,
    *,
    modes: Sequence[Mode] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> AuditReport:
    """Audits a model on one packed batch. Weights, gradients, buffers and random generators are afterwards as they were.

    Args:
        model: on its device.
        batch: on any device.
        documents: what the batch was packed from. Without them its boundaries and media slots are believed.
        modes: ways to run the model; by default as it is configured, in fp32.
        seed: of dropout and of the directions that gradients are taken in.
        progress: called with (mode, passes done, passes in all).

    Raises:
        DataError: the batch has fewer than two documents, so there is nothing to hold apart.
    """
    device = next(model.parameters()).device
    if modes is None:
        modes = [own_mode(model, "fp32", device)]
    owned = Ownership.of_batch(batch) if documents is None else Ownership.of_documents(documents)
    if len(owned.lengths) < 2:
        raise DataError(
            "an audit needs at least two documents in the batch: raise data.bin_tokens, or take another step"
        )
    report = AuditReport(documents=len(owned.lengths), tokens=owned.num_tokens)
    if documents is not None:
        _check_packing(report, batch, documents, owned)
        if not owned.fits(batch):
            report.notes.append(
                "the batch has not the parts that its documents have, so that the model was not run on it"
            )
            return report
    with left_as_it_was(model, device):
        for mode in modes:
            with running(model, mode, device):
                subject = Subject(model, batch.to(device), owned, seed)
                _audit_mode(subject, mode, report, partial(progress, str(mode)) if progress else None)
    return report


def _check_packing(report: AuditReport, batch: PackedBatch, documents: Sequence[Document], owned: Ownership) -> None:
    found: dict[str, dict[int, float]] = {what: {} for what in PARTS}
    for document, what, number in mismatches(batch.to("cpu"), documents):
        found[what][document] = float(number)
    for what, wrong in found.items():
        report.count(None, "packing", what, len(documents), wrong.values())
        for document in report.worth_tracing(None, "packing", what, wrong):
            report.add_leak(Leak(None, "packing", what, None, owned.place(document), wrong[document]))


def _audit_mode(subject: Subject, mode: Mode, report: AuditReport, progress: Callable[[int, int], None] | None) -> None:
    family = every_pair if mode.every_pair else neighbours
    jobs: list[Callable[[], None]] = []
    base = subject.observe(subject.batch)
    if not base.hidden.isfinite().all():
        report.add_blind(Blind(mode, "token", "hidden states", None))
        report.notes.append(f"{mode}: hidden states are not finite, so that nothing can be said of them")
        return
    if base.equals(subject.observe(subject.batch)):
        forward = ForwardAudit(subject, base, mode, report)
        if any(isinstance(module, LayerMemory) for module in subject.model.modules()):
            jobs.append(partial(audit_lane, subject, mode, report))
        for sweep in sweeps(subject.batch, subject.owned, subject.model.vocab_size):
            units = family(sweep.num_units)
            jobs += [partial(forward.run_pass, sweep, some, number) for number, some in enumerate(units)]
        jobs.append(forward.finish)
    else:
        report.notes.append(f"{mode}: two equal runs differ, so that only gradients can be held to be zero")
    gradients = GradientAudit(subject, mode, report)
    num_documents = len(subject.owned.lengths)
    jobs += [partial(gradients.run_pass, some, number) for number, some in enumerate(family(num_documents))]
    jobs += [partial(gradients.run_loss_pass, some) for some in stretches(num_documents)]
    for kind, media in subject.batch.media.items():
        if len(media.num_tokens) > 1:
            encoder = EncoderAudit(subject, kind, mode, report)
            units = family(len(media.num_tokens))
            jobs += [partial(look, some) for look in (encoder.change, encoder.differentiate) for some in units]
    for number, job in enumerate(jobs):
        if progress:
            progress(number, len(jobs))
        job()
    if progress:
        progress(len(jobs), len(jobs))
