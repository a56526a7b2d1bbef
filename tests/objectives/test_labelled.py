"""Classification and regression: what their documents hold, and that their losses are what PyTorch makes of every document by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_lengths import media_item

from mmctx.config import build_config
from mmctx.errors import ConfigError, SampleError
from mmctx.objectives import build_data_halves, build_model_halves
from mmctx.objectives.classification import ClassificationConfig
from mmctx.objectives.regression import RegressionConfig
from mmctx.pack import IGNORE_INDEX, Document, pack_documents
from mmctx.sample import Sample
from mmctx.tokenizer import TextTokenizer

MOOD = {"label": "mood", "classes": ["good", "bad", True, 3]}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> TextTokenizer:
    return TextTokenizer(corpus / "tokenizer")


def documents(tokenizer: TextTokenizer, config: Any, sample: Sample) -> list[Document]:
    (half,) = build_data_halves({"x": config}, tokenizer).values()
    return half.documents(sample, np.random.default_rng(0))


def test_documents_are_texts_behind_a_medium_or_segments_in_order(tokenizer: TextTokenizer) -> None:
    a, b, clip, end = np.array([5, 6]), np.array([7]), media_item("audio", 2), tokenizer.embed_id
    sample = Sample("k", "s", 0, texts=(a, b), audio=clip, facts={"mood": "bad"})
    sound = tokenizer.placeholder_ids["audio"]
    for more, want in (
        ({}, [5, 6, end]),
        ({"texts": (1, 0)}, [7, end, 5, 6, end]),
        ({"texts": (0,), "context": "audio"}, [sound, sound, 5, 6, end]),
        ({"texts": (), "context": "audio"}, [sound, sound, end]),
        ({"texts": (2,)}, None),
        ({"texts": (), "context": "image"}, None),
    ):
        found = documents(tokenizer, build_config(ClassificationConfig, {**MOOD, **more}, "tree"), sample)
        assert [d.input_ids.tolist() for d in found] == ([] if want is None else [want])
        for document in found:
            assert document.labels.tolist() == [IGNORE_INDEX] * (len(want or ()) - 1) + [1]
            assert not document.causal
    mixed = Sample("k", "s", 0, segments=(a, clip, b), facts={"mood": True})
    (document,) = documents(tokenizer, build_config(ClassificationConfig, MOOD, "tree"), mixed)
    assert (document.input_ids.tolist(), document.labels[-1]) == ([5, 6, sound, sound, 7, end], 2)


@pytest.mark.parametrize("facts", [None, {}, {"mood": None}, {"mood": "ugly"}, {"mood": 1}, {"mood": ["good"]}, []])
def test_a_label_that_is_none_is_said_with_its_place(tokenizer: TextTokenizer, facts: Any) -> None:
    sample = Sample("k", "s", 0, texts=(np.array([5]),), facts=facts)
    with pytest.raises(SampleError, match=r"objectives.x.label=mood: expected one of good, bad, true, 3, found"):
        documents(tokenizer, build_config(ClassificationConfig, MOOD, "tree"), sample)


@pytest.mark.parametrize("value", [None, True, "3", float("nan"), 1e9])
def test_what_is_no_number_is_said(tokenizer: TextTokenizer, value: Any) -> None:
    sample = Sample("k", "s", 0, texts=(np.array([5]),), facts={"stars": value})
    with pytest.raises(SampleError, match=r"expected a number|set it to their spread"):
        documents(tokenizer, RegressionConfig(label="stars"), sample)


def test_wrong_settings_are_named() -> None:
    for change, complaint in (
        ({"classes": ["a"]}, "two or more"),
        ({"classes": [1, "1"]}, "different ones"),
        ({"class_weights": [1, 2]}, "2 entries for 4 classes"),
        ({"class_weights": [1, 2, -1, 0]}, "negative"),
        ({"texts": []}, "nothing to read"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            build_config(ClassificationConfig, {**MOOD, **change}, "tree")


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_losses_are_those_of_pytorch_on_every_document_alone(tokenizer: TextTokenizer, pooling: Any) -> None:
    weights = (1.0, 0.5, 2.0, 3.0)
    mood = ClassificationConfig(**MOOD, class_weights=weights, pooling=pooling)
    stars = RegressionConfig(label="stars", offset=3, scale=2, pooling=pooling, causal=True)
    halves = build_data_halves({"mood": mood, "stars": stars}, tokenizer)
    torch.manual_seed(0)
    heads: Any = build_model_halves({"mood": mood, "stars": stars}, 8).double()
    labels = [("good", 1.25), (3, -7), (True, 3), ("bad", 0)]
    made = []
    for number, (name, value) in enumerate(labels):
        sample = Sample("k", "s", 0, texts=(np.arange(5, 7 + number),), facts={"mood": name, "stars": value})
        made += [d for half in halves.values() for d in half.documents(sample, np.random.default_rng(0))]
    batch = pack_documents(made, tokenizer.placeholder_ids)
    hidden = torch.randn(batch.num_tokens, 8, dtype=torch.float64, requires_grad=True)
    want = {"mood": torch.zeros((), dtype=torch.float64), "stars": torch.zeros((), dtype=torch.float64)}
    seen = dict.fromkeys(want, 0)
    for name, states in zip(batch.objectives, hidden.split(batch.layout.lengths), strict=True):
        scores = heads[name].probe(states[-1] if pooling == "token" else states.mean(dim=0))
        label, value = labels[seen[name]]
        seen[name] += 1
        if name == "mood":
            number = [*MOOD["classes"]].index(label)
            want[name] = want[name] - weights[number] * torch.log_softmax(scores, dim=0)[number]
        else:
            want[name] = want[name] + (scores[0] - (value - 3) / 2) ** 2
    for name, total in want.items():
        found = heads[name](hidden, batch, torch.zeros(1, 8))
        assert found.count == 4
        torch.testing.assert_close(found.total, total, rtol=1e-6, atol=1e-6)  # labels are in steps of 2^-20
        ours, theirs = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (found.total, total))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_labels_are_shown_in_their_own_units(tokenizer: TextTokenizer) -> None:
    config = RegressionConfig(label="stars", offset=3, scale=2)
    (half,) = build_data_halves({"x": config}, tokenizer).values()
    sample = Sample("k", "s", 0, texts=(np.array([5]),), facts={"stars": -4.5})
    (document,) = half.documents(sample, np.random.default_rng(0))
    assert half.answers[int(document.labels[-1])] == "-4.5"
