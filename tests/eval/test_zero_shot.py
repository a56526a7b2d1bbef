"""The suite `zero_shot` against scores computed one by one, and at the bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contexts import far_from_neutral
from tiny import triple, write_shard
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.errors import ConfigError
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.suite_config import ZeroShotConfig
from mmctx.eval.suites.zero_shot import Scored, _scored, class_vectors, summarise
from mmctx.eval.views import embed_views
from mmctx.pack import pack_documents
from mmctx.train.config import RunConfig

CLASSES = ["a red cat", "a blue bird", "moon", "the small house", "fish", "dog", "one tall tree"]
TEMPLATES = ["{}", "look, {}"]


def make_context(tree: dict[str, Any], tmp_path, classes, templates=("{}",), **settings: Any) -> EvalContext:
    """Untrained, but far from the neutral start; sample i shows class i % len(CLASSES)."""
    samples = [triple(seed) | {"txt": CLASSES[seed % len(CLASSES)].encode()} for seed in range(10)]
    write_shard(tmp_path / "h.tar", samples)
    tree["eval"]["sources"]["heldout"]["shards"] = str(tmp_path / "h.tar")
    tree["eval"]["zero_shot"] = {"classes": classes, "templates": list(templates), **settings}
    return far_from_neutral(tree)


@torch.no_grad()
def slow_log_prob(context: EvalContext, document, text: str) -> float:
    """log P(text <eos> | document's medium), one whole forward pass for every token."""
    from dataclasses import replace

    ids = document.input_ids[: document.media[0][1].num_tokens]
    total = 0.0
    for token in [*context.data.tokenizer.encode(text), context.data.tokenizer.eos_id]:
        part = replace(document, input_ids=ids, labels=np.full_like(ids, -100))
        hidden = context.model.encode(pack_documents([part], context.data.tokenizer.placeholder_ids))
        total += float(context.model.next_token_logits(hidden[-1:]).double().log_softmax(-1)[0, token])
        ids = np.append(ids, token)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("bin_tokens", [600, 128])  # all texts of a medium in one pass, and cut between passes
def test_captions_are_scored_as_one_by_one(tree: dict[str, Any], tmp_path, bin_tokens: int) -> None:
    tree["data"]["bin_tokens"] = bin_tokens
    context = make_context(tree, tmp_path, CLASSES, TEMPLATES)
    found = evaluate(context, ("zero_shot",))["zero_shot"]
    data = context.data.only("captioning")
    for kind, place in (("image", 0), ("audio", 1)):
        hits = []
        for sample in range(10):
            document = data.dataset.documents(0, sample, 0)[place]
            scores = [
                np.logaddexp.reduce([slow_log_prob(context, document, t.replace("{}", name)) for t in TEMPLATES])
                for name in CLASSES
            ]
            hits.append(int(np.argmax(scores)) == sample % len(CLASSES))
        assert found[f"{kind}/captioning"]["top1"] == np.mean(hits)
        assert found[f"{kind}/captioning"]["n"] == 10
        assert found[f"{kind}/captioning"]["chance"] == pytest.approx(1 / 7)


def test_classes_of_a_similarity_are_their_texts(tree: dict[str, Any], tmp_path) -> None:
    """With the template `{}` a class is the embedding of a sample's own text, which the retrieval suite knows."""
    context = make_context(tree, tmp_path, CLASSES)
    found = evaluate(context, ("zero_shot",))["zero_shot"]
    with torch.no_grad():
        views = {kind: (v.embeddings, v.samples) for kind, v in embed_views(context, "similarity").items()}
    texts = views["text0"][0][np.argsort(views["text0"][1])][: len(CLASSES)]  # sample i shows class i
    for kind in ("image", "audio"):
        media = views[kind][0][np.argsort(views[kind][1])]
        best = (media @ texts.T).argmax(dim=1)
        assert found[f"{kind}/similarity"]["top1"] == (best == torch.arange(10) % len(CLASSES)).double().mean()


def test_two_ranks_give_the_numbers_of_one(tree: dict[str, Any], tmp_path) -> None:
    tree["data"]["bin_tokens"] = 128
    context = make_context(tree, tmp_path, CLASSES, TEMPLATES)
    assert len(context.bins("captioning")[1]) > 1
    alone = evaluate(context, ["zero_shot", "swapped_media"])
    assert alone["swapped_media"]["captioning"]["documents"] == 20
    assert on_two_ranks(context, lambda one: evaluate(one, ["zero_shot", "swapped_media"])) == [alone, alone]


def test_a_class_is_the_mean_of_its_templates() -> None:
    """zero_shot_classifier of clip_benchmark, written out."""
    embeddings = np.random.default_rng(0).standard_normal((4, 3, 8))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    expected = []
    for texts in embeddings:
        mean = texts.mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(class_vectors(torch.from_numpy(embeddings)).numpy(), expected)


def test_summary_of_an_oracle_and_of_a_blind_model() -> None:
    labels = [str(number) for number in range(10)]
    oracle = [_scored("image", n % 10, torch.eye(10)[n % 10]) for n in range(50)]
    found = summarise(oracle, labels)
    assert (found["top1"], found["top5"], found["n"], found["chance"]) == (1.0, 1.0, 50, 0.1)
    assert found["low"] < 0.95
    assert found["high"] == pytest.approx(1.0)
    blind = [_scored("image", n % 10, torch.zeros(10)) for n in range(50)]
    assert (summarise(blind, labels)["top1"], summarise(blind, labels)["top5"]) == (0.0, 0.0)


def test_summary_counts_by_class() -> None:
    found = summarise([Scored("image", 0, 1), Scored("image", 0, 2), Scored("image", 1, 1)], ["a", "b", "c"])
    assert found["per_class"] == {"a": 0.5, "b": 1.0}
    assert found["mean_per_class"] == 0.75
    assert found["top1"] == pytest.approx(2 / 3)
    assert "top5" not in found  # of three classes it would say nothing
    assert summarise([Scored("image", None, 0)], ["a", "b"]) == {"n": 0, "unlabelled": 1}


def test_labels_may_have_other_names(tree: dict[str, Any], tmp_path) -> None:
    """Labels stand where the config says, and samples of no class are counted apart."""
    context = make_context(tree, tmp_path, {text[::-1]: text for text in CLASSES[:6]}, label="json:names.other")
    samples = [
        triple(seed) | {"json": b'{"names": {"other": "%s"}}' % CLASSES[seed % 7][::-1].encode()} for seed in range(10)
    ]
    write_shard(tmp_path / "other.tar", samples)
    tree["eval"]["sources"]["heldout"]["shards"] = str(tmp_path / "other.tar")
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    context = EvalContext(context.model, data, config.objectives, config.eval, torch.device("cpu"))
    found = evaluate(context, ("zero_shot",))["zero_shot"]["image/captioning"]
    assert (found["n"], found["unlabelled"]) == (9, 1)
    assert set(found["per_class"]) == {text[::-1] for text in CLASSES[:6]}


def test_without_classes(tree: dict[str, Any], tmp_path) -> None:
    context = make_context(tree, tmp_path, CLASSES)
    config = context.config.model_copy(update={"zero_shot": None})
    with pytest.raises(ConfigError, match=r"eval\.zero_shot"):
        evaluate(EvalContext(**{**vars(context), "config": config}), ("zero_shot",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a"]}, "at least two classes"),
        ({"classes": ["a", "a"]}, "each once"),
        ({"classes": ["a", "b"], "templates": ["x"]}, r"must each hold \{\}"),
        ({"classes": ["a", "b"], "templates": []}, r"must each hold \{\}"),
    ],
)
def test_wrong_classes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(ZeroShotConfig, settings, "x.yaml")
