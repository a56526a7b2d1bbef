"""The leak audit of a model with a memory: clean as it is, and bugs that let a memory cross documents are found."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tree
from torch import Tensor

from mmctx.attention import memory_tiles as module
from mmctx.attention.memory import Far, Past, memory_attention
from mmctx.audit import AuditReport, Mode, audit_batch, other_modes, own_mode
from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.lane import Lane
from mmctx.layout import DocumentLayout
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.parallel import ulysses
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

PLAIN = Mode("sdpa", "fp32", False)
Run = tuple[MmctxModel, list[Document], PackedBatch]


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Books, captions and masked texts, pictures and clips among them, under windows of four tokens and a memory."""
    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["model"]["transformer"] |= {"windows": [4], "memory": {"layers": [1], "top_k": 3}, "dropout": 0.0}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    chosen = [(0, 0), (0, 1), (0, 2), (1, 0)]  # books, then triples
    documents = [d for number, sample in chosen for d in data.dataset.documents(number, sample, 0)]
    batch = pack_documents(documents, data.tokenizer.placeholder_ids)
    return build_model(config, len(data.tokenizer)), documents, batch


@pytest.fixture
def run(made: Run) -> Run:
    return copy.deepcopy(made[0]), *made[1:]


def leaking(report: AuditReport) -> set[tuple[str, str]]:
    return {(row.perturbation, row.observed) for row in report.rows.values() if row.leaks}


@pytest.mark.slow
def test_clean_in_every_mode_that_runs_here(run: Run) -> None:
    model, documents, batch = run
    own = own_mode(model, "fp32", torch.device("cpu"))
    others, _ = other_modes(own, model, torch.device("cpu"))
    report = audit_batch(model, batch, documents, modes=[own, *others])
    assert report.ok, (report.leaks, report.blind)


def test_clean(run: Run) -> None:
    model, documents, batch = run
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert report.ok, (report.leaks, report.blind)
    assert "document before on its lane" in {row.perturbation for row in report.rows.values()}


def across_documents(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, far: Far, **options: Any) -> Tensor:
    """Takes the bin for one document's past: windows are kept, the memory is everybody's."""
    own = memory_attention(q, k, v, layout, far, **options)
    whole = DocumentLayout.from_lengths([layout.num_tokens], 1)
    return own + 0.1 * memory_attention(q, k, v, whole, far, **options)


def of_the_document_before(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, far: Far, **options: Any) -> Tensor:
    """Begins the second document with what the first has left."""
    out, first = memory_attention(q, k, v, layout, far, **options), layout.lengths[0]
    second = slice(first, first + layout.lengths[1])
    alone = replace(far, q=far.q[second], k=far.k[second])
    past = Past(*(x[:first] for x in (k, v, far.k)))
    single = DocumentLayout.from_lengths([layout.lengths[1]], 1)
    found = memory_attention(q[second], k[second], v[second], single, alone, **options, past=past)
    return torch.cat([out[: second.start], found, out[second.stop :]])


@pytest.mark.parametrize("bug", [across_documents, of_the_document_before])
def test_a_memory_that_crosses_documents_is_found(run: Run, monkeypatch: pytest.MonkeyPatch, bug: Any) -> None:
    model, documents, batch = run
    monkeypatch.setattr(ulysses, "memory_attention", bug)
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert leaking(report) >= {("token", "hidden states"), ("gradient", "embeddings")}
    pair = {(0, 1)} if bug is of_the_document_before else set()
    assert pair <= {
        (leak.source.document, leak.victim.document) for leak in report.leaks if leak.source and leak.victim
    }


def test_a_search_that_sees_the_future_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents, batch = run
    search = module.search

    def late(q: Tensor, k: Tensor, *, first: int, **options: Any) -> Tensor:
        return search(q, k, first=min(first + 8, k.shape[1] - q.shape[2] + 8), **options).clamp(max=k.shape[1] - 1)

    monkeypatch.setattr(module, "search", late)
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert leaking(report) >= {("token", "its own past"), ("gradient", "its own future")}


def test_a_lane_that_is_not_cleared_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents, batch = run

    def keep(self: Lane, start: int) -> None:
        self.length, self._next, self._num_tokens = start, {}, 0

    monkeypatch.setattr(Lane, "open", keep)
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert leaking(report) == {("document before on its lane", "hidden states")}


def test_a_lane_that_carries_nothing_is_blind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents, batch = run
    monkeypatch.setattr(Lane, "commit", lambda self: None)
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert not report.leaks
    assert {b.perturbation for b in report.blind} == {"document before on its lane"}
