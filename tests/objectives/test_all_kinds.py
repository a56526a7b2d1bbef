"""Every kind of objective on real shards: kept apart when packed, audited, planned, shown, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_tree, words, write_shard

from mmctx.audit import Mode, audit_batch
from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.plan import Plan, plan_once
from mmctx.datasets.view.batch_page import batch_page
from mmctx.eval import EvalContext, evaluate
from mmctx.fingerprint import bin_fingerprint
from mmctx.model import MmctxModel
from mmctx.objectives import KINDS
from mmctx.objectives.next_sentence import NextSentenceConfig, NextSentenceLoss
from mmctx.objectives.pooling import pool_states
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

OBJECTIVES = {
    "captioning": {"kind": "captioning", "prompt": "red: ", "label_smoothing": 0.1},
    "spans": {"kind": "masked_lm", "span": 2.0, "rate": {"start": 0.6, "end": 0.1, "steps": 4}},
    "mntp": {"kind": "masked_lm", "attention": "causal"},
    "sentences": {"kind": "similarity", "pairs": [["span0", "span1"]], "pooling": "mean", "span_tokens": 6},
    "order": {"kind": "next_sentence", "negatives": "swapped"},
    "next": {"kind": "next_sentence"},
    "denoising": {"kind": "denoising", "delete": 0.2, "mask": 0.2, "pieces": 2},
    "sort": {"kind": "classification", "label": "sort", "classes": ["odd", "even"], "class_weights": [1, 3]},
    "mean_sort": {
        "kind": "classification",
        "label": "sort",
        "classes": ["odd", "even"],
        "pooling": "mean",
        "causal": True,
    },
    "number": {"kind": "regression", "label": "number", "offset": 20, "scale": 10, "pooling": "mean"},
}


@pytest.fixture(scope="module")
def tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kinds")
    texts = [
        {
            "__key__": f"{n}",
            "txt": words(n, 5 + n % 30).encode(),
            "json": json.dumps({"sort": ("even", "odd")[n % 2], "number": n}).encode(),
        }
        for n in range(40)
    ]
    write_shard(folder / "texts.tar", texts)
    tree = tiny_tree(corpus, folder / "runs")
    tree["model"]["transformer"] |= {"dropout": 0.0, "windows": [None, 6]}
    tree["objectives"] = OBJECTIVES
    source = {"shards": str(folder / "texts.tar"), "objectives": list(OBJECTIVES), "long_documents": "split"}
    tree["data"] |= {"sources": {"texts": source}, "context_length": 64}
    tree["eval"]["sources"] = {"held_out": source}
    return tree


@pytest.fixture(scope="module")
def config(tree: dict[str, Any]) -> RunConfig:
    return build_config(RunConfig, tree, "tree")


@pytest.fixture(scope="module")
def data(config: RunConfig) -> RunData:
    return build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)


@pytest.fixture(scope="module")
def model(config: RunConfig, data: RunData) -> MmctxModel:
    return build_model(config, len(data.tokenizer)).double()


@pytest.fixture(scope="module")
def documents(data: RunData) -> list[Document]:
    return [d for sample in range(5) for d in data.dataset.documents(0, sample, 0)]


def pack(data: RunData, documents: list[Document]) -> PackedBatch:
    return pack_documents(documents, data.tokenizer.placeholder_ids)


def test_they_are_all_here(config: RunConfig, documents: list[Document]) -> None:
    assert {objective.kind for objective in config.objectives.values()} == set(KINDS)
    assert {document.objective for document in documents} == set(OBJECTIVES)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sentences"])
def test_loss_and_gradients_are_the_sum_over_documents(
    model: MmctxModel, data: RunData, documents: list[Document], objective: str
) -> None:
    parameters = list(model.parameters())
    packed = model.losses(pack(data, documents))[objective]
    alone = [model.losses(pack(data, [d]))[objective] for d in documents if d.objective == objective]
    assert packed.count == sum(part.count for part in alone) > 0
    total = torch.stack([part.total for part in alone]).sum()
    torch.testing.assert_close(packed.total, total, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(packed.total, parameters, allow_unused=True)
    theirs = torch.autograd.grad(total, parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-9)


def test_a_mean_embedding_is_that_of_its_document_alone(
    model: MmctxModel, data: RunData, documents: list[Document]
) -> None:
    head: Any = model.objectives["sentences"]
    batch = pack(data, documents)
    hidden = model.encode(batch)
    mine = [d for d in documents if d.objective == "sentences"]
    for view in ("span0", "span1"):
        name = f"sentences/{view}"
        together = head.embed(hidden, batch.pooled[name], batch.pool_sizes[name])
        alone = [head.projection(model.encode(pack(data, [d])).mean(dim=0)) for d in mine if d.view == view]
        torch.testing.assert_close(together, F.normalize(torch.stack(alone), dim=-1), rtol=1e-10, atol=1e-10)


def test_means_pool_their_own_positions() -> None:
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([8, 1, 2, 5, 0, 3])
    found = pool_states(hidden, positions, (1, 3, 2))
    want = torch.stack([hidden[8], hidden[[1, 2, 5]].mean(dim=0), hidden[[0, 3]].mean(dim=0)])
    torch.testing.assert_close(found, want)
    weights = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), hidden)[0] for x in (found, want))
    torch.testing.assert_close(ours, theirs)
    assert pool_states(hidden.float(), positions, (1, 3, 2)).dtype == torch.float32


def test_next_sentence_is_binary_cross_entropy(data: RunData, documents: list[Document]) -> None:
    torch.manual_seed(0)
    loss = NextSentenceLoss("next", NextSentenceConfig(), 8).double()
    batch = pack(data, documents)
    hidden = torch.randn(batch.num_tokens, 8, dtype=torch.float64)
    result = loss(hidden, batch, torch.zeros(1, 8))
    want = torch.zeros((), dtype=torch.float64)
    ends = np.cumsum(batch.layout.lengths)
    for name, end in zip(batch.objectives, ends.tolist(), strict=True):
        if name == "next":
            (p,) = torch.sigmoid(loss.probe(hidden[end - 1]))
            want -= p.log() if batch.labels[end - 1] == 1 else (1 - p).log()
    torch.testing.assert_close(result.total, want)
    assert result.count == loss.count(batch) == batch.objectives.count("next")
    nothing = loss(hidden, pack(data, [d for d in documents if d.objective == "denoising"]), torch.zeros(1, 8))
    assert nothing.count == 0
    assert nothing.total.item() == 0
    assert nothing.total.requires_grad


@pytest.mark.slow
def test_the_audit_finds_no_leak_and_is_not_blind(model: MmctxModel, data: RunData, documents: list[Document]) -> None:
    batch = pack(data, documents[: 2 * len(OBJECTIVES) + 2])
    report = audit_batch(
        model.float(), batch, documents[: 2 * len(OBJECTIVES) + 2], modes=[Mode("sdpa", "fp32", False)]
    )
    model.double()
    assert report.ok, [*report.leaks, *report.blind]


def test_the_audit_sees_a_mean_that_lacks_a_position(
    model: MmctxModel, data: RunData, documents: list[Document]
) -> None:
    from dataclasses import replace

    from mmctx.audit.packing import mismatches

    batch = pack(data, documents)
    assert not mismatches(batch, documents)
    sizes = batch.pool_sizes["sentences/span0"]
    moved = {"sentences/span0": (sizes[0] - 1, sizes[1] + 1, *sizes[2:])}
    wrong = replace(batch, pool_sizes={**batch.pool_sizes, **moved})
    assert {found.what for found in mismatches(wrong, documents)} == {"pooled"}


def test_bins_know_their_step_and_rates_follow_it(config: RunConfig, data: RunData) -> None:
    plan = Plan(config.data, data.tables, 1)
    shares = []
    for step in range(6):
        bins = plan.step(step)
        assert {bin.step for bin in bins} == {step}
        batches = [data.dataset[bin] for bin in bins]
        shares.append(_hidden_share(batches))
        again = Plan(config.data, data.tables, 1).step(step)  # a run that starts here
        assert [bin_fingerprint(0, data.dataset[bin]) for bin in again] == [bin_fingerprint(0, b) for b in batches]
        assert [sum(batch.layout.lengths) for batch in batches] == [bin.tokens for bin in bins]
    assert shares[0] == pytest.approx(0.6, abs=0.08)
    assert shares[4] == pytest.approx(0.1, abs=0.05)
    assert shares[5] == pytest.approx(0.1, abs=0.05)
    whole = [data.dataset[bin] for bin in plan_once(list(data.tables.values()), 600)]
    assert _hidden_share(whole) == pytest.approx(0.1, abs=0.03)


def _hidden_share(batches: list[PackedBatch]) -> float:
    """Labels for each token of the objective whose rate follows a schedule."""
    labels = sum(len(batch.label_positions["spans"]) for batch in batches)
    lengths = [n for b in batches for n, name in zip(b.layout.lengths, b.objectives, strict=True) if name == "spans"]
    return labels / sum(lengths)


def test_parts_of_a_long_text_are_other_samples(data: RunData, tree: dict[str, Any]) -> None:
    """Spans of two parts must not be taken for partners."""
    tree = tree | {"data": tree["data"] | {"context_length": 30}}
    config = build_config(RunConfig, tree, "tree")
    short = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0).dataset
    found = short.tables[0].units(np.arange(short.tables[0].num_samples))
    assert found.part.max() >= 2
    owners = found.owner[found.part == 2]
    made = [short.documents(0, int(owners[0]), 0, part) for part in range(3)]
    pairs = [{d.pair for d in documents if d.objective == "sentences"} for documents in made]
    assert all(len(pair) <= 1 for pair in pairs)
    assert len(set().union(*pairs)) == sum(map(len, pairs)) >= 2
    assert all(0 <= number < 1 << 63 for pair in pairs for number in pair)


def test_the_page_says_what_is_right(config: RunConfig, data: RunData) -> None:
    bins = Plan(config.data, data.tables, 1).step(0)
    page = batch_page("tiny", 0, data, bins, [data.dataset[bin] for bin in bins])
    assert "not next</rt>" in page
    assert "predicted from position" in page
    assert "span0, the mean over positions 0 to" in page


def test_held_out_accuracy(config: RunConfig, model: MmctxModel) -> None:
    held_out = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    context = EvalContext(model.float(), held_out, config.objectives, config.eval, torch.device("cpu"))
    results = evaluate(context, ("next_sentence", "masked_lm", "loss", "retrieval"))
    model.double()
    assert results["next_sentence"]["n"] == 2 * results["loss"]["next"]["n"] > 0
    assert 0 <= results["next_sentence"]["accuracy"] <= 1
    assert results["loss"]["next"]["held_out"] == pytest.approx(np.log(2), abs=0.3)
    assert results["loss"]["denoising"]["held_out"] == pytest.approx(np.log(len(held_out.tokenizer)), rel=0.1)
    assert results["retrieval"]["span0_to_span1"]["n"] == results["loss"]["next"]["n"]
