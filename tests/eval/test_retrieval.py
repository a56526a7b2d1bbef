"""Suite `retrieval` against sorting by hand, clip_benchmark, an oracle, a blind model, and samples that show the same thing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import png, triple, words, write_shard
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.ranking import best_ranks, chance, score_ranks
from mmctx.eval.suites.retrieval import score_pair
from mmctx.eval.views import View, embed_views
from mmctx.pack import PackedBatch
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


@pytest.fixture
def clip_recall() -> Any:
    """clip_benchmark's `recall_at_k`, which imports tqdm for its loop over images and nothing heavy."""
    retrieval = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_retrieval", reason="clip_benchmark is not installed"
    )
    return retrieval.recall_at_k


def from_scores(scores: Tensor, query_keys: np.ndarray, candidate_keys: np.ndarray, tile: int | None = None):
    """Ranks for any scores (Q, C): the candidates' embeddings are one-hot, the queries' their scores."""
    return best_ranks(scores, torch.eye(scores.shape[1]), query_keys, candidate_keys, tile)


def groups(seed: int, queries: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of keys in which every query has one right candidate at least, most of them several."""
    rng = np.random.default_rng(seed)
    offered = rng.integers(0, max(candidates // 3, 1), (candidates, 2))
    wanted = offered[rng.integers(0, candidates, queries)]
    return wanted, offered


@pytest.mark.parametrize("tile", [None, 1, 7])
@pytest.mark.parametrize(("queries", "candidates"), [(40, 40), (33, 90), (60, 25)])
def test_recall_is_clip_benchmarks(clip_recall: Any, queries: int, candidates: int, tile: int | None) -> None:
    scores = torch.randn(queries, candidates, generator=torch.Generator().manual_seed(queries))
    wanted, offered = groups(1, queries, candidates)
    right = torch.from_numpy((wanted[:, None] == offered[None]).any(axis=2))
    assert 1.5 < right.sum(dim=1).double().mean() < 12
    ranks, positives = from_scores(scores, wanted, offered, tile)
    found = score_ranks(ranks, positives, candidates)
    for k in (1, 5, 10):
        expected = clip_recall(scores, right, k) > 0
        assert found[f"R@{k}"] == expected.double().mean(), k
    assert positives.tolist() == right.sum(dim=1).tolist()
    order = scores.argsort(dim=1, descending=True)
    first = right.gather(1, order).int().argmax(dim=1) + 1
    assert found["MRR"] == pytest.approx((1 / first.double()).mean().item())


def test_ranks_are_counted_from_one() -> None:
    keys = np.arange(20)[:, None]
    ranks, positives = from_scores(torch.arange(20.0).repeat(20, 1), keys, keys)  # candidate k gets score k
    assert ranks.tolist() == list(range(20, 0, -1))
    found = score_ranks(ranks, positives, 20)
    assert (found["R@1"], found["R@5"], found["R@10"], found["n"]) == (1 / 20, 5 / 20, 10 / 20, 20)
    assert found["MRR"] == pytest.approx(np.mean([1 / rank for rank in range(1, 21)]))
    assert found["interval"]["R@5"] == pytest.approx([0.1119, 0.4687], abs=1e-4)  # Wilson, 5 of 20


def test_a_blind_model_finds_nothing() -> None:
    keys = np.arange(50)[:, None]
    assert score_ranks(*from_scores(torch.zeros(50, 50), keys, keys), 50)["R@10"] == 0.0


def test_a_missing_key_matches_nothing() -> None:
    wanted, offered = np.array([[0, -1], [1, -1]]), np.array([[0, -1], [1, 5], [2, -1]])
    assert from_scores(torch.rand(2, 3), wanted, offered)[1].tolist() == [1, 1]


@pytest.mark.parametrize("positives", [1, 3, 30])
def test_random_orders_are_at_chance(positives: int) -> None:
    rng = np.random.default_rng(positives)
    first = np.array([np.flatnonzero(rng.permutation(60) < positives)[0] + 1 for _ in range(20_000)])
    found = chance([positives] * 5, 60)
    for k in (1, 5, 10):
        assert found[f"R@{k}"] == pytest.approx(np.mean(first <= k), abs=0.012)
    assert found["MRR"] == pytest.approx(np.mean(1 / first), abs=0.008)
    assert chance([1, 3], 60)["R@1"] == pytest.approx((1 / 60 + 3 / 60) / 2)


def test_a_single_positive_has_the_known_chance() -> None:
    found = chance([1], 16)
    assert [found[f"R@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 16, 5 / 16, 10 / 16])
    assert found["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 17)) / 16)


def test_scores_of_millions_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: made.append(plain(a, b)) or made[-1])
    keys = np.arange(5000)[:, None]
    vectors = torch.nn.functional.normalize(torch.randn(5000, 4), dim=1)
    best_ranks(vectors, vectors, keys, keys)
    assert max(part.numel() for part in made) <= 1 << 22
    assert sum(part.numel() for part in made) == 5000**2


def view(vectors: Tensor, samples: list[int], contents: list[int]) -> View:
    return View(vectors, np.array(samples), np.array(contents))


def test_only_samples_with_both_views_take_part() -> None:
    a = view(torch.eye(3), [4, 5, 6], [0, 1, 2])
    b = view(torch.eye(3)[[2, 0, 1]], [6, 7, 4], [3, 4, 5])
    found = score_pair(a, b)
    assert (found["n"], found["candidates"], found["positives"]) == (2, 2, 1.0)
    assert found["R@1"] == 0.5  # 6 meets itself, 4 has the vector of 7, whose own is out


# Twelve samples: pictures 0 and 1 are one, texts 2 and 3 are one; all else is different.
def twins() -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"s{n:02d}",
            "png": png(0 if n == 1 else n),
            "txt": (words(2 if n == 3 else n, 3) + f" {2 if n == 3 else n}").encode(),
            "json": json.dumps({"more": f"other {n} {words(n, 2)}"}).encode(),
        }
        for n in range(12)
    ]


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    write_shard(tmp_path / "twins.tar", twins())
    held_out = {"shards": str(tmp_path / "twins.tar"), "texts": ["txt", "json:more"], "objectives": ["similarity"]}
    tree["eval"]["sources"] = {"twins": held_out}
    tree["objectives"]["similarity"]["pairs"] = [["image", "text0"], ["image", "text1"]]
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer)).eval()
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def test_equal_pictures_and_equal_texts_are_right_for_each_other(context: EvalContext) -> None:
    found = evaluate(context, ["retrieval"])["retrieval"]
    assert set(found) == {
        f"{a}_to_{b}" for a, b in [("image", "text"), ("text", "image"), ("image", "text1"), ("text1", "image")]
    } | {"image_to_texts", "texts_to_image"}
    # of 12 samples two share a picture and two a text: 4 of them have 2 right candidates
    assert found["image_to_text"]["positives"] == found["text_to_image"]["positives"] == pytest.approx(16 / 12)
    assert found["image_to_text1"]["positives"] == pytest.approx(14 / 12)
    assert found["image_to_text"]["chance"]["R@1"] == pytest.approx(16 / 12 / 12)
    # all 24 texts: 2 for a picture, 4 for either of the shared pictures, 3 for those of the shared text (own two and the other's)
    assert found["image_to_texts"]["candidates"] == found["texts_to_image"]["n"] == 24
    assert found["image_to_texts"]["n"] == 12
    assert found["image_to_texts"]["positives"] == pytest.approx((2 * 4 + 2 * 3 + 8 * 2) / 12)
    assert found["texts_to_image"]["positives"] == pytest.approx((4 * 2 + 2 * 2 + 18 * 1) / 24)


def test_views_of_equal_content_are_known(context: EvalContext) -> None:
    views = embed_views(context, "similarity")
    for name, pair in {"image": (0, 1), "text0": (2, 3)}.items():
        contents = views[name].contents[np.argsort(views[name].samples)]
        same = contents[:, None] == contents[None]
        assert same.sum() == 12 + 2
        assert same[pair]
    assert len(set(views["text1"].contents)) == 12
    only = embed_views(context, "similarity", kind="image")
    assert set(only) == {"image"}
    torch.testing.assert_close(only["image"].embeddings, views["image"].embeddings)


class Numbered(nn.Module):
    """Hidden states are the one-hot of the sample that a document belongs to, and so are embeddings; a `blind` one embeds all alike."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        self.objectives = {"similarity": self}

    def encode(self, batch: PackedBatch) -> Tensor:
        owner = torch.tensor([int(key[1:]) for key in batch.keys])
        return torch.eye(12)[owner.repeat_interleave(torch.tensor(batch.layout.lengths))]

    def embed(self, hidden: Tensor, positions: Tensor, sizes: Any) -> Tensor:
        return torch.ones(len(sizes), 1) if self.blind else hidden[positions]


@pytest.mark.parametrize("blind", [False, True])
def test_an_oracle_finds_all_and_a_blind_model_nothing(context: EvalContext, blind: bool) -> None:
    context = replace(context, model=Numbered(blind))  # type: ignore[arg-type]
    for scores in evaluate(context, ["retrieval"])["retrieval"].values():
        assert [scores["R@1"], scores["R@10"]] == ([0.0, 0.0] if blind else [1.0, 1.0])


def test_two_ranks_give_the_numbers_of_one(context: EvalContext) -> None:
    context = replace(
        context, data=replace(context.data, config=context.data.config.model_copy(update={"bin_tokens": 64}))
    )
    assert len(context.bins("similarity")[1]) > 3
    alone = evaluate(context, ["retrieval"])
    assert on_two_ranks(context, lambda one: evaluate(one, ["retrieval"])) == [alone, alone]


def test_each_source_is_searched_by_itself_too(tree: dict[str, Any], tmp_path: Path) -> None:
    """What a source has among its own is what it has when there is no other; together there are more to choose from."""
    source = tree["eval"]["sources"]["heldout"]
    write_shard(tmp_path / "more.tar", [triple(seed) for seed in range(5)])
    tree["eval"]["sources"] = {"more": source | {"shards": str(tmp_path / "more.tar")}, "heldout": source}

    def found_in(*names: str) -> dict[str, Any]:
        sources = {name: tree["eval"]["sources"][name] for name in names}
        config = build_config(RunConfig, tree | {"eval": {"sources": sources}}, "tree")
        data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
        torch.manual_seed(0)
        model = build_model(config, len(data.tokenizer))
        context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
        return evaluate(context, ["retrieval"])["retrieval"]

    both = found_in("more", "heldout")
    assert both["image_to_text"]["n"] == 5 + 16
    for name in ("more", "heldout"):
        alone = found_in(name)
        assert not any("by_source" in scores for scores in alone.values())
        assert {way: both[way]["by_source"][name] for way in alone} == alone
