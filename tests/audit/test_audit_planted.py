"""The audit finds each bug that peers have shipped, says between which documents, and finds none where there is none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import torch
from tiny import tiny_tree
from torch import nn

from mmctx.attention import BACKENDS
from mmctx.audit import AuditReport, Mode, audit_batch, other_modes, own_mode
from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.errors import DataError
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

CPU = torch.device("cpu")
PLAIN = Mode("sdpa", "fp32", False)


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MmctxModel, list[Document], PackedBatch]:
    """A model with every modality and objective, windows and dropout, and a few documents of each kind."""
    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["model"]["transformer"] |= {"windows": [None, 6]}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    chosen = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]  # books, then triples
    documents = [d for number, sample in chosen for d in data.dataset.documents(number, sample, 0)]
    assert {item.kind for d in documents for _, item in d.media} == {"image", "audio"}
    batch = pack_documents(documents, data.tokenizer.placeholder_ids)
    return build_model(config, len(data.tokenizer)), documents, batch


@pytest.fixture
def run(made) -> tuple[MmctxModel, list[Document], PackedBatch]:
    model, documents, batch = made
    return copy.deepcopy(model), documents, batch


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor]) -> Mode:
    name = function.__name__  # of its own: which backend serves a request is remembered by name
    monkeypatch.setitem(BACKENDS, name, planted.backend(function))
    return Mode(name, "fp32", False)


def leaking(report: AuditReport) -> set[tuple[str, str]]:
    return {(row.perturbation, row.observed) for row in report.rows.values() if row.leaks}


def test_clean_in_every_mode_that_runs_here(run) -> None:
    model, documents, batch = run
    own = own_mode(model, "fp32", CPU)
    others, notes = other_modes(own, model, CPU)
    assert [(m.precision, m.checkpointing) for m in others] == [("fp32", True), ("bf16", False), ("bf16", True)]
    assert len(notes) == 2 * (len(BACKENDS) - 1)
    report = audit_batch(model, batch, documents, modes=[own, *others])
    assert report.ok, (report.leaks, report.blind)
    assert not report.notes
    assert {(row.mode, row.perturbation) for row in report.rows.values() if row.mode} == {
        (mode, changed) for mode in (own, *others) for changed in ("token", "patch", "frame", "label", "gradient")
    }
    assert all(row.comparisons for row in report.rows.values())
    json.dumps(report.to_json(), allow_nan=False)


def test_a_leak_over_a_distance_needs_every_pair(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of documents 0 and 2 are changed, or left alone, together when only neighbours are looked at."""
    model, documents, batch = run
    mode = plant(monkeypatch, planted.two_documents_further)
    assert ("token", "hidden states") not in leaking(audit_batch(model, batch, documents, modes=[mode]))
    report = audit_batch(model, batch, documents, modes=[replace(mode, every_pair=True)])
    assert leaking(report) >= {("token", "hidden states"), ("gradient", "embeddings")}
    pairs = {(leak.source.document, leak.victim.document) for leak in report.leaks if leak.source and leak.victim}
    assert (0, 2) in pairs
    assert {victim for _, victim in pairs} == {2}


ATTENTION_BUGS = {
    "padding_only": {
        ("token", "hidden states"),
        ("token", "its own past"),
        ("gradient", "embeddings"),
        ("gradient", "pixels"),
    },
    "no_mask": {("token", "hidden states"), ("token", "loss"), ("frame", "embedding"), ("gradient", "embeddings")},
    "off_by_one": {("gradient", "embeddings")},
    "window_over_border": {("token", "hidden states"), ("gradient", "embeddings")},
    "sees_the_future": {("gradient", "its own future"), ("token", "its own past")},
    "wrong_backward": {("gradient", "embeddings")},
}


@pytest.mark.parametrize("name", ATTENTION_BUGS)
def test_attention_that_leaks(run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, documents, batch = run
    mode = plant(monkeypatch, getattr(planted, name))
    report = audit_batch(model, batch, documents, modes=[mode])
    assert not report.ok
    assert leaking(report) >= ATTENTION_BUGS[name]


def test_boundary_off_by_one_is_traced_to_the_two_documents(run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents, batch = run
    report = audit_batch(model, batch, documents, modes=[plant(monkeypatch, planted.off_by_one)])
    told = [leak for leak in report.leaks if leak.observed == "embeddings"]  # not those of clips in their encoder
    pairs = {(leak.source.document, leak.victim.document) for leak in told if leak.source and leak.victim}
    lengths = batch.layout.lengths
    border = next(n for n in range(len(lengths) // 2, len(lengths) - 1) if lengths[n + 1] > 1)
    assert pairs <= {(border, border + 1), (border + 1, border)}
    assert pairs


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_leaks_are_found_in_each_mode(run, monkeypatch, precision: str, checkpointing: bool) -> None:
    model, documents, batch = run
    mode = replace(plant(monkeypatch, planted.no_mask), precision=precision, checkpointing=checkpointing)
    report = audit_batch(model, batch, documents, modes=[mode])
    assert leaking(report) >= {("token", "hidden states"), ("gradient", "embeddings"), ("frame", "hidden states")}


def test_a_leak_of_half_precision_alone(run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents, batch = run
    full = plant(monkeypatch, planted.right_in_float32)
    half = replace(full, precision="bf16")
    report = audit_batch(model, batch, documents, modes=[full, half])
    assert {row.mode for row in report.rows.values() if row.leaks} == {half}


OBJECTIVE_BUGS: dict[str, tuple[str, type[nn.Module], set[tuple[str, str]]]] = {
    "mean over a neighbour": ("similarity", planted.PoolsOverNeighbour, {("token", "embedding")}),
    "pooling off by one": (
        "similarity",
        planted.PoolsOffByOne,
        {("token", "embedding"), ("gradient", "hidden states of a loss")},
    ),
    "similarity of a mix": (
        "similarity",
        planted.LossOverNeighbour,
        {("frame", "shared loss"), ("gradient", "hidden states of a loss")},
    ),
    "ids shifted over the border": ("captioning", planted.ShiftsOverBorder, {("token", "loss")}),
    "labels shifted twice more": ("captioning", planted.ShiftsLabelsAgain, {("label", "loss")}),
}


@pytest.mark.parametrize("name", OBJECTIVE_BUGS)
def test_objective_that_reads_a_neighbour(run, name: str) -> None:
    model, documents, batch = run
    objective, cls, expected = OBJECTIVE_BUGS[name]
    planted.swap_objective(model, objective, cls)
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert leaking(report) >= expected


ENCODER_BUGS = {
    "attend_across_clips": {
        ("frame", "embeddings of another audio"),
        ("gradient", "frames of another audio"),
        ("frame", "hidden states"),
        ("gradient", "frames"),
    },
    "normalise_over_batch": {
        ("patch", "embeddings of another image"),
        ("gradient", "pixels of another image"),
        ("patch", "hidden states"),
        ("gradient", "pixels"),
    },
}


@pytest.mark.parametrize("name", ENCODER_BUGS)
def test_encoder_whose_items_see_each_other(run, name: str) -> None:
    model, documents, batch = run
    getattr(planted, name)(model)
    before = copy.deepcopy(model.state_dict())
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert leaking(report) >= ENCODER_BUGS[name]
    for key, tensor in model.state_dict().items():  # running statistics, too
        assert torch.equal(tensor, before[key]), key


def test_media_scattered_to_the_neighbours_slots(run) -> None:
    model, documents, batch = run
    model.__class__ = planted.ScattersToNeighbour
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert leaking(report) >= {("patch", "hidden states"), ("gradient", "pixels")}


PACKING_BUGS = {
    "with_rows_of_neighbour": ("media", True),
    "with_label_over_border": ("labels", False),
    "with_late_boundary": ("boundaries", True),
    "with_running_positions": ("position_ids", False),
    "with_late_pooling": ("pooled", True),
}


@pytest.mark.parametrize("name", PACKING_BUGS)
def test_batch_that_is_packed_wrongly(run, name: str) -> None:
    """What the model can show, it shows, too: who owns what is told by the documents, not by the batch."""
    model, documents, batch = run
    what, model_shows = PACKING_BUGS[name]
    report = audit_batch(model, getattr(planted, name)(batch), documents, modes=[PLAIN])
    assert not report.ok
    assert ("packing", what) in leaking(report)
    assert any(perturbation != "packing" for perturbation, _ in leaking(report)) == model_shows


def test_batch_that_lacks_a_part(run) -> None:
    model, documents, batch = run
    pooled = {name: places[1:] for name, places in batch.pooled.items()}
    report = audit_batch(model, replace(batch, pooled=pooled), documents, modes=[PLAIN])
    assert leaking(report) == {("packing", "pooled")}
    assert "not run" in report.notes[0]


def test_a_check_that_cannot_fail_is_reported(run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents, batch = run
    nothing = audit_batch(model, batch, documents, modes=[plant(monkeypatch, planted.sees_nothing)])
    assert not nothing.ok
    assert not nothing.leaks
    assert {(b.perturbation, b.observed) for b in nothing.blind} >= {("token", "hidden states")}

    deaf = copy.deepcopy(model)
    planted.ignore_pictures(deaf)
    report = audit_batch(deaf, batch, documents, modes=[PLAIN])
    assert not report.leaks
    assert ("patch", "hidden states") in {(b.perturbation, b.observed) for b in report.blind}

    planted.swap_objective(model, "captioning", planted.IgnoresLabels)
    report = audit_batch(model, batch, documents, modes=[PLAIN])
    assert ("label", "loss") in {(b.perturbation, b.observed) for b in report.blind}


def test_nothing_is_left_behind(run) -> None:
    model, documents, batch = run
    model.eval()
    model.encoders["audio"].train()
    flags = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    audit_batch(model, batch, documents, modes=[Mode("sdpa", "bf16", True)])
    assert torch.equal(torch.rand(4), expected)
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.trunk.activations.checkpoint == "none"
    assert not torch.is_autocast_enabled("cpu")


def test_without_documents_the_batch_is_believed(run) -> None:
    model, _, batch = run
    report = audit_batch(model, batch, modes=[PLAIN])
    assert report.ok
    assert all(row.mode is not None for row in report.rows.values())


def test_one_document_cannot_be_audited(run) -> None:
    model, documents, _ = run
    alone = pack_documents([d for d in documents if not d.media][:1], {})
    with pytest.raises(DataError, match="two documents"):
        audit_batch(model, alone)
