"""The suite `probe`: an oracle, a blind model, labels without meaning, and its classifiers against others written out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import far_from_neutral
from tiny import triple, write_shard
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.errors import ConfigError, DataError
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.classifiers import classify, held_back, linear_probe, nearest
from mmctx.eval.suite_config import ProbeConfig
from mmctx.eval.suites.probe import _all_places, _features, evaluate_probe, probe_headline, read_label
from mmctx.eval.views import embed_views
from mmctx.pack import PackedBatch

LABELS = dict.fromkeys(("image", "audio", "text0"), "json:about.kind")


def labelled(number: int, label: Any) -> dict[str, Any]:
    about = {"about": {"kind": label}, "names": {"other": "some words"}}
    return triple(number) | {"__key__": f"s{number:03d}", "json": json.dumps(about).encode()}


def make_tree(tree: dict[str, Any], tmp_path: Path, train: list[Any], test: list[Any]) -> dict[str, Any]:
    """Labels of the training samples s000, s001, ... and of the held-out ones s500, s501, ..."""
    source = tree["data"]["sources"]["triples"]
    write_shard(tmp_path / "train.tar", [labelled(n, label) for n, label in enumerate(train)])
    write_shard(tmp_path / "test.tar", [labelled(500 + n, label) for n, label in enumerate(test)])
    tree["data"]["sources"] = {"triples": source | {"shards": str(tmp_path / "train.tar")}}
    tree["eval"]["sources"] = {"heldout": source | {"shards": str(tmp_path / "test.tar")}}
    tree["eval"]["probe"] = {"labels": LABELS, "neighbours": [1, 3], "inverse_penalties": [0.01, 1]}
    return tree


class Knows(nn.Module):
    """Gives every token of a document the same state, made of the sample's number; nothing of it where it is blind."""

    def __init__(self, model: Any, blind: bool) -> None:
        super().__init__()
        self.config, self.blind = model.config, blind
        self.objectives = {"similarity": Knows.Head()}

    class Head(nn.Module):
        def embed(self, hidden: Tensor, positions: Tensor, sizes: Any) -> Tensor:
            return hidden[positions]

    def embed(self, batch: PackedBatch) -> Tensor:
        classes = torch.tensor([int(key[1:]) % 3 for key in batch.keys])
        states = torch.zeros(len(classes), 3) if self.blind else torch.eye(3)[classes]
        return states.repeat_interleave(torch.tensor(batch.layout.lengths), dim=0)

    def read(self, inputs: Tensor, batch: PackedBatch) -> Tensor:
        return inputs


@pytest.mark.parametrize("blind", [False, True])
def test_an_oracle_names_all_and_a_blind_model_the_commonest(tree: dict[str, Any], tmp_path: Path, blind: bool) -> None:
    train = ["abc"[n % 3] for n in range(30)] + ["c"] * 6
    test = ["abc"[(500 + n) % 3] for n in range(12)]
    train[30:] = ["c" if (n % 3) == 2 else "abc"[n % 3] for n in range(30, 36)]
    context = far_from_neutral(make_tree(tree, tmp_path, train, test))
    context = replace(context, model=Knows(context.model, blind))  # type: ignore[arg-type]
    found = evaluate(context, ["probe"])["probe"]
    assert set(found) == set(LABELS)
    for scores in found.values():
        assert (scores["classes"], scores["n_train"], scores["n"], scores["unseen"]) == (3, 36, 12, 0)
        assert scores["chance"] == pytest.approx(1 / 3)
        assert scores["majority"] == pytest.approx(4 / 12)  # of equals the first, a
        for reading in ("input", "trunk", "embedding"):
            accuracies = {scores[reading][kind]["accuracy"] for kind in ("linear", "1-NN", "3-NN")}
            assert accuracies == ({4 / 12} if blind else {1.0})
    assert set(probe_headline(found)) == {
        f"{view}/{reading}" for view in LABELS for reading in ("input", "trunk", "embedding")
    }
    low, high = (found["image"]["trunk"]["linear"][end] for end in ("low", "high"))
    assert (low, high) == pytest.approx((0.1381, 0.6094) if blind else (0.7575, 1.0), abs=1e-4)  # Wilson, of 12


@pytest.mark.slow
def test_labels_without_meaning_are_at_chance(tree: dict[str, Any], tmp_path: Path) -> None:
    """Real features under shuffled labels: a probe that is above chance by another way than what features tell would show here."""
    context = far_from_neutral(make_tree(tree, tmp_path, ["a"], ["a", "b"] * 40))
    with torch.no_grad():
        found = _features(context, context.data, _all_places(context.data))
    rng = np.random.default_rng(0)
    for view in LABELS:
        features = np.stack([one.readings["trunk"] for one in found if one.view == view]).astype(np.float64)
        accuracies: dict[str, list[float]] = {"linear": [], "1-NN": []}
        for _ in range(30):
            labels = rng.permutation(np.arange(80) % 2)
            fit, asked = np.split(rng.permutation(80), 2)
            scores = classify(
                features[fit], labels[fit], features[asked], labels[asked], (1,), (0.01, 1.0), rng.permutation(40)
            )
            for kind, known in accuracies.items():
                known.append(scores[kind]["accuracy"])
        for kind, known in accuracies.items():
            assert np.mean(known) == pytest.approx(0.5, abs=0.06), (view, kind)  # four standard errors


def test_an_untrained_encoder_tells_high_tones_from_low(tree: dict[str, Any], tmp_path: Path) -> None:
    """Real features: tiny's clips have a tone of one of 20 pitches, which random weights do not hide. What a picture of noise shows
    does not help."""
    train, test = ([("low", "high")[n % 20 >= 10] for n in range(start, start + 60)] for start in (0, 500))
    found = evaluate(far_from_neutral(make_tree(tree, tmp_path, train, test)), ["probe"])["probe"]
    assert found["audio"]["input"]["linear"]["low"] > 0.6
    assert found["image"]["input"]["linear"]["low"] < 0.5


def test_readings_are_those_of_the_model(tree: dict[str, Any], tmp_path: Path) -> None:
    context = far_from_neutral(make_tree(tree, tmp_path, ["a"], ["a", "b", "a"]))
    with torch.no_grad():
        found = _features(context, context.data, _all_places(context.data))
        views = embed_views(context, "similarity")
        for view in LABELS:
            mine = [one for one in found if one.view == view]
            assert [one.key for one in mine] == [f"heldout/s50{n}" for n in range(3)]
            order = np.argsort(views[view].samples)
            embedded = np.stack([one.readings["embedding"] for one in mine])
            np.testing.assert_allclose(embedded, views[view].embeddings.numpy()[order], atol=1e-5)
        table = context.data.dataset.tables[0]
        batch = context.data.only("similarity").dataset
        (document, *_) = batch.documents(0, 0, 0)
        assert document.view == "image"
        from mmctx.pack import pack_documents

        packed = pack_documents([document], context.data.tokenizer.placeholder_ids)
        encoded = context.model.encoders["image"](packed.media["image"])  # (tokens, D)
        hidden = context.model.encode(packed)
    first = next(one for one in found if one.view == "image")
    np.testing.assert_allclose(first.readings["input"], encoded.mean(dim=0).numpy(), atol=1e-5)
    np.testing.assert_allclose(first.readings["trunk"], hidden[:-1].mean(dim=0).numpy(), atol=1e-5)
    assert table.num_samples == 3


def test_views_that_nothing_embeds_have_two_readings(tree: dict[str, Any], tmp_path: Path) -> None:
    make_tree(tree, tmp_path, ["a", "b"] * 3, ["a", "b"])
    tree["objectives"] = {"captioning": {"kind": "captioning"}}
    for part in (tree["data"], tree["eval"]):
        for source in part["sources"].values():
            source["objectives"] = ["captioning"]
    found = evaluate(far_from_neutral(tree), ["probe"])["probe"]
    assert all("embedding" not in scores and {"input", "trunk"} < scores.keys() for scores in found.values())


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tree: dict[str, Any], tmp_path: Path) -> None:
    train = ["abc"[n % 3] for n in range(70)]
    context = far_from_neutral(make_tree(tree, tmp_path, train, train[:40]))
    alone = evaluate(context, ["probe"])
    assert 0.05 < alone["probe"]["image"]["trunk"]["linear"]["accuracy"] < 0.95
    assert on_two_ranks(context, lambda one: evaluate(one, ["probe"])) == [alone, alone]


def test_what_is_fitted_on(tree: dict[str, Any], tmp_path: Path) -> None:
    """All training sources, one of them, or shards of their own, no more than `samples`; samples without a label are left out."""
    make_tree(tree, tmp_path, [0, 1, 0, 1, True, None], [0, 1, 7])
    write_shard(tmp_path / "own.tar", [labelled(900 + n, n % 2) for n in range(8)])
    source = tree["data"]["sources"]["triples"]
    tree["data"]["sources"]["more"] = source | {"shards": str(tmp_path / "test.tar"), "augment": {"image": {"flip": 1}}}
    context = far_from_neutral(tree)

    def fitted(**settings: Any) -> dict[str, Any]:
        probe = build_config(ProbeConfig, {"labels": {"image": "json:about.kind"}, **settings}, "test")
        return evaluate_probe(replace(context, config=context.config.model_copy(update={"probe": probe})))["image"]

    assert (fitted()["n_train"], fitted()["classes"], fitted()["unseen"]) == (8, 4, 0)  # 0, 1, 7 and True
    one = fitted(train="triples")
    assert (one["n_train"], one["classes"], one["unseen"], one["n"]) == (5, 3, 1, 3)
    assert one["trunk"]["linear"]["accuracy"] <= 2 / 3
    assert fitted(train=source | {"shards": str(tmp_path / "own.tar")})["n_train"] == 8
    assert fitted(train=source | {"shards": str(tmp_path / "own.tar")}, samples=5)["n_train"] == 5
    with pytest.raises(ConfigError, match="no training source 'other'; there are triples, more"):
        fitted(train="other")
    with pytest.raises(DataError, match="8 training samples of 1 classes"):
        fitted(train=source | {"shards": str(tmp_path / "own.tar")}, labels={"image": "json:names.other"})


def test_a_suite_without_labels_says_so(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"eval\.probe\.labels"):
        evaluate(far_from_neutral(tree), ["probe"])
    with pytest.raises(ConfigError, match="not 'video'"):
        build_config(ProbeConfig, {"labels": {"video": "txt"}}, "test")


def test_labels_may_be_texts_numbers_and_truth_values() -> None:
    members = {"cls": b" 3\n", "json": b'{"a": {"b": 7, "c": [1]}, "d": false, "e": "x y "}'}
    entries = ["cls", "txt", "json:a.b", "json:a.c", "json:a.b.c", "json:d", "json:e", "json:f"]
    found = [read_label(entry, members) for entry in entries]
    assert found == ["3", None, "7", None, None, "False", "x y", None]


def blobs(seed: int, count: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Points around four corners; the scales of their coordinates differ."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=count)
    centres = np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0.0]])
    return (centres[labels] + spread * rng.standard_normal((count, 3))) * [1, 10, 100], labels


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_linear_probe_is_the_minimum_of_its_loss(penalty: float) -> None:
    """Against the same loss minimised by torch, on features standardised by hand."""
    features, labels = blobs(0, 300)
    probe = linear_probe(features, labels, [penalty], np.zeros(300, bool))
    scaled = torch.from_numpy((features - features.mean(0)) / features.std(0))
    weight, bias = (torch.zeros(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = scaled @ weight.T + bias
        value = nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum") * penalty
        value = value + weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    expected = (scaled @ weight.T + bias).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(probe.predict_proba(features), expected, atol=2e-3)


def test_the_penalty_is_the_best_on_what_is_held_back() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, labels = blobs(1, 120, 2.5)
    back, grid = held_back(labels, np.random.default_rng(0).permutation(120)), [10.0, 1e-3, 0.1]
    scaler = StandardScaler().fit(features[~back])
    inputs = scaler.transform(features)
    fitted = {c: LogisticRegression(C=c).fit(inputs[~back], labels[~back]) for c in grid}
    right = {c: (model.predict(inputs[back]) == labels[back]).mean() for c, model in fitted.items()}
    assert len(set(right.values())) > 1
    best = max(sorted(grid), key=lambda c: right[c])
    assert best == linear_probe(features, labels, grid, back)["logisticregression"].C
    assert linear_probe(features, labels, grid, np.zeros(120, bool))["logisticregression"].C == 0.1


@pytest.mark.parametrize("k", [1, 5, 500])
def test_neighbours_are_those_of_highest_cosine(k: int) -> None:
    features, labels = blobs(2, 90)
    queries, _ = blobs(3, 40)
    found = nearest(features, labels, k).predict(queries)
    unit, asked = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (features, queries))
    order = np.argsort(-(asked @ unit.T), axis=1)[:, :k]
    votes = np.stack([(labels[order] == label).sum(axis=1) for label in range(4)], axis=1)
    np.testing.assert_array_equal(found, votes.argmax(axis=1))


def test_every_fifth_of_a_class_is_held_back() -> None:
    labels, order = np.repeat([0, 1, 2], [10, 4, 23]), np.random.default_rng(0).permutation(37)
    back = held_back(labels, order)
    assert [int(back[labels == label].sum()) for label in range(3)] == [2, 0, 4]
    assert not np.array_equal(back, held_back(labels, order[::-1]))
    moved = np.random.default_rng(1).permutation(37)  # who is held back does not hang on who stands where
    np.testing.assert_array_equal(held_back(labels[moved], order[moved]), back[moved])


def test_classes_that_were_never_seen_are_never_right() -> None:
    features, labels = blobs(4, 60, 0.1)
    wanted = np.where(labels == 3, -1, labels)
    found = classify(features, labels, features, wanted, (1,), (1.0,), np.arange(60))
    assert found["1-NN"]["accuracy"] == found["linear"]["accuracy"] == np.mean(labels != 3)


def test_scikit_learn_is_asked_for(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mmctx.eval import packages
    from mmctx.eval.suites import SUITES

    context: EvalContext = far_from_neutral(tree)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sklearn is not installed: pip install 'mmctx\[eval\]'"):
        SUITES["probe"].check(context.config)
