"""A stream's memory must not outlive its document: after another document on the same lane, a document is read as if on a fresh one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmctx.audit.observe import Subject
from mmctx.audit.report import AuditReport, Blind, Leak, Mode
from mmctx.lane import Lane

LANE = "document before on its lane"
_OBSERVED = "hidden states"


def audit_lane(subject: Subject, mode: Mode, report: AuditReport) -> None:
    """Reads the batch on a fresh lane, and once more behind itself: as a new document, where no bit may change, and as a further piece,
    where something must, or the check sees nothing.

    Only where the first document is causal, and a layer has a window to carry.
    """
    config = subject.model.trunk.config
    windows = [config.layer_window(layer) for layer in range(config.depth)]
    if not subject.owned.causal[0] or not any(window is not None and window > 1 for window in windows):
        return
    fresh, behind = Lane(), Lane()
    base = _read(subject, fresh, 0)
    behind.layers, behind.length = fresh.layers, fresh.length
    seen = _read(subject, behind, 0)
    length = subject.owned.lengths[0]
    places = {0: slice(0, length), 1: slice(length, None)}
    wrong = {n: float((base[s] - seen[s]).abs().max()) for n, s in places.items() if not torch.equal(base[s], seen[s])}
    report.count(mode, LANE, _OBSERVED, len(subject.owned.lengths), wrong.values())
    for document in report.worth_tracing(mode, LANE, _OBSERVED, wrong):
        place = subject.owned.place(document)
        report.add_leak(Leak(mode, LANE, _OBSERVED, subject.owned.place(0), place, wrong[document]))
    further = _read(subject, fresh, length)
    if torch.equal(base[:length], further[:length]):
        report.add_blind(Blind(mode, LANE, _OBSERVED, subject.owned.place(0)))


@torch.no_grad()
def _read(subject: Subject, lane: Lane, start: int) -> Tensor:
    """Hidden states (T, D) of the batch, its first document a piece that begins after `start` tokens."""
    lane.open(start)
    hidden, _ = subject.run(replace(subject.batch, stream_start=start, lane=lane))
    lane.commit()
    return hidden.detach()
