"""Suites `classification` and `regression` against scikit-learn's and SciPy's own numbers, an oracle, a blind model, and two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from contexts import far_from_neutral
from sklearn import metrics
from tiny import words, write_shard
from two_ranks import on_two_ranks

from mmctx.eval import EvalContext, evaluate
from mmctx.eval.suites.classification import score_classes
from mmctx.eval.suites.regression import score_numbers


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    samples = [
        {
            "__key__": f"{n}",
            "txt": words(n, 4).encode(),
            "json": json.dumps({"of": {"sort": n % 3, "size": n / 2}}).encode(),
        }
        for n in range(30)
    ]
    samples += [{"__key__": "x", "txt": b"red", "json": json.dumps({"of": {"sort": 7, "size": "big"}}).encode()}]
    write_shard(tmp_path / "labels.tar", samples)
    tree["objectives"] = {
        "sort": {"kind": "classification", "label": "of.sort", "classes": [0, 1, 2, 3]},
        "size": {"kind": "regression", "label": "of.size", "offset": 7, "scale": 4, "pooling": "mean"},
    }
    source = {"shards": str(tmp_path / "labels.tar"), "objectives": ["sort", "size"]}
    tree["data"] |= {"sources": {"labels": source}, "bin_tokens": 128}
    tree["eval"]["sources"] = {"heldout": source}
    return far_from_neutral(tree)


def test_results_are_those_of_the_model_on_every_document_and_equal_on_two_ranks(context: EvalContext) -> None:
    suites = ("classification", "regression")
    results = evaluate(context, suites)
    model: Any = context.model
    truth, chosen, right, guessed = [], [], [], []
    dataset, placeholders = context.data.dataset, context.data.tokenizer.placeholder_ids
    from mmctx.pack import pack_documents

    with torch.no_grad():
        for number in range(30):
            sort, size = dataset.documents(0, number, 0)
            hidden = model.encode(pack_documents([sort], placeholders))
            truth.append(number % 3)
            chosen.append(int(model.objectives["sort"].probe(hidden[-1]).argmax()))
            hidden = model.encode(pack_documents([size], placeholders))
            right.append(number / 2)
            guessed.append(float(model.objectives["size"].probe(hidden.mean(dim=0))) * 4 + 7)
    sorts, sizes = results["classification"]["sort"], results["regression"]["size"]
    assert sorts["n"] == sizes["n"] == 30
    assert sorts["accuracy"] == metrics.accuracy_score(truth, chosen)
    assert sorts["macro_f1"] == pytest.approx(metrics.f1_score(truth, chosen, average="macro", zero_division=0))
    assert sorts["confusion"] == metrics.confusion_matrix(truth, chosen, labels=range(4)).tolist()
    assert sizes["mse"]["mean"] == pytest.approx(np.mean(np.square(np.subtract(right, guessed))), rel=1e-4)
    assert sizes["pearson"]["value"] == pytest.approx(scipy.stats.pearsonr(right, guessed)[0], abs=1e-4)
    assert results["skipped"] == {"bad_json": 1}
    for together in on_two_ranks(context, lambda one: evaluate(one, suites)):
        assert {name: together[name] for name in suites} == {name: results[name] for name in suites}


def test_the_commonest_class_is_the_baseline() -> None:
    truth, chosen = [0] * 60 + [1] * 40, [0] * 50 + [1] * 10 + [1] * 30 + [0] * 10
    scores = score_classes(truth, chosen, ["no", "yes"])
    assert (scores["accuracy"], scores["majority"]["accuracy"], scores["majority"]["class"]) == (0.8, 0.6, "no")
    assert scores["low"] < 0.8 < scores["high"]
    assert scores["majority"]["low"] < 0.6 < scores["majority"]["high"]
    assert scores["majority"]["macro_f1"] == pytest.approx(metrics.f1_score(truth, [0] * 100, average="macro"))
    assert scores["per_class"]["yes"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "n": 40}


def test_right_numbers_score_one_and_equal_ones_nothing() -> None:
    truth = [1.0, 2.0, 4.0, 3.0, 9.0]
    perfect, blind = score_numbers(truth, truth), score_numbers(truth, [3.8] * 5)
    assert (perfect["pearson"]["value"], perfect["spearman"]["value"]) == (pytest.approx(1), pytest.approx(1))
    assert (perfect["mse"]["mean"], perfect["r2"]) == (0, 1)
    assert (blind["pearson"]["value"], blind["spearman"]["value"]) == (0, 0)
    assert blind["mse"]["mean"] == pytest.approx(blind["mse_of_mean"]["mean"])
    assert blind["r2"] == pytest.approx(0)


def test_a_source_without_labels_has_no_results(context: EvalContext) -> None:
    nothing = replace(context, objectives={})
    assert evaluate(nothing, ("classification", "regression")) == {
        "classification": {},
        "regression": {},
        "skipped": {},
    }
