"""The suite `swapped_media`: documents with the wrong media, and what a model that looks or does not look loses by them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from contexts import far_from_neutral

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.suites.swapped_media import compare, swap_media
from mmctx.pack import IGNORE_INDEX, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


@pytest.fixture
def context(tree: dict[str, Any], corpus) -> EvalContext:
    """Pairs and books; a model away from the neutral start, so that it does look."""
    tree["eval"]["sources"]["books"] = {"shards": str(corpus / "books-*.tar"), "objectives": ["captioning"]}
    return far_from_neutral(tree)


def documents_of(context: EvalContext) -> list:
    """Books, then clips with their texts."""
    data = context.data.only("captioning")
    number = {name: place for place, name in enumerate(data.tables)}
    books = [data.dataset.documents(number["books"], sample, 0)[0] for sample in range(12)]
    return books + [data.dataset.documents(number["heldout"], sample, 0)[1] for sample in range(16)]


def predicted(document) -> list[tuple[int, int]]:
    """(token read, token predicted) at each labelled place; a placeholder counts as 0."""
    where = np.flatnonzero(document.labels != IGNORE_INDEX)
    return [(int(document.labels[i]), int(document.input_ids[i + 1])) for i in where]


def test_other_media_in_the_same_places_of_the_text(context: EvalContext) -> None:
    found = documents_of(context)
    placeholders = context.data.tokenizer.placeholder_ids
    moved = 0
    for document, other in pairwise(found):
        donors = [item for _, item in other.media]
        if {i.kind for _, i in document.media} - {i.kind for i in donors}:
            continue
        swapped = swap_media(document, donors)
        pack_documents([swapped], placeholders)  # which counts placeholders
        kept = [d.input_ids[~np.isin(d.input_ids, list(placeholders.values()))] for d in (document, swapped)]
        np.testing.assert_array_equal(*kept)
        assert predicted(swapped) == predicted(document)
        assert all(label == following for label, following in predicted(swapped))
        assert [item.kind for _, item in swapped.media] == [item.kind for _, item in document.media]
        assert all(any(item is donor for donor in donors) for _, item in swapped.media)
        moved += len(swapped.input_ids) != len(document.input_ids)
    assert moved  # clips of other lengths were among them


def test_its_own_media_change_nothing(context: EvalContext) -> None:
    for document in documents_of(context):
        same = swap_media(document, [item for _, item in document.media])
        np.testing.assert_array_equal(same.input_ids, document.input_ids)
        np.testing.assert_array_equal(same.labels, document.labels)


@pytest.mark.slow
def test_who_looks_and_who_does_not(tree: dict[str, Any]) -> None:
    """A model that knows these pictures by heart, and the same model with its eyes closed."""
    tree["model"]["audio"] = None  # one would hear how long a clip is, whatever is in it
    tree["model"]["transformer"]["dropout"] = 0.0
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    torch.manual_seed(0)
    model = build_model(config, len(data.tokenizer))
    context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0)
    read, bins = context.bins("captioning")
    batches = [read.dataset[bin] for bin in bins]
    for _ in range(60):
        for batch in batches:
            loss = model.losses(batch)["captioning"]
            optimizer.zero_grad()
            (loss.total / loss.count).backward()
            optimizer.step()
    looks = evaluate(context, ("swapped_media",))["swapped_media"]["captioning"]
    assert looks["documents"] == 16
    assert looks["own"] < 1
    assert looks["low"] > 1  # far worse with the wrong pictures
    held_out = evaluate(context, ("loss",))["loss"]["captioning"]
    assert looks["own"] == pytest.approx(held_out["held_out"], abs=0.01)  # all of its text stands behind a picture
    assert looks["n"] == held_out["n"]
    for parameter in model.encoders["image"].projector.parameters():  # type: ignore[union-attr]
        torch.nn.init.zeros_(parameter)
    blind = evaluate(context, ("swapped_media",))["swapped_media"]["captioning"]
    assert blind["own"] == pytest.approx(blind["swapped"], abs=1e-5)
    assert blind["low"] == pytest.approx(0, abs=1e-5) == blind["high"]


def test_interval_of_the_difference() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(5, 20, 400)
    own = rng.normal(2.0, 0.3, 400) * counts
    noise = rng.normal(0, 0.5, 400)
    alike = compare(list(zip(own, own + noise, counts.tolist(), strict=True)))
    worse = compare(list(zip(own, own + 0.1 * counts + noise, counts.tolist(), strict=True)))
    assert alike["low"] < 0 < alike["high"]
    assert 0 < worse["low"] < 0.1 < worse["high"]
    assert worse["own"] == pytest.approx(own.sum() / counts.sum())
    assert worse["excess"] == pytest.approx(worse["swapped"] - worse["own"])
