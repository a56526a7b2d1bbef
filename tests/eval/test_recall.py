"""Suite `recall` against models whose answers are known: an oracle that looks facts up, one that guesses, and the controls of the suite."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.build.recall import build_recall
from mmctx.errors import DataError
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.documents import excerpt
from mmctx.eval.intervals import wilson_interval
from mmctx.eval.report.charts import draw_lines
from mmctx.eval.report.pieces import HeatMap, Lines, Table
from mmctx.eval.report.sections.recall import recall_section
from mmctx.eval.suites.recall import evaluate_recall, load_quizzes, passes, without_facts
from mmctx.pack import PackedBatch
from mmctx.train.config import RunConfig


class Oracle(nn.Module):
    """Looks up what followed the last mention of the two tokens before, up to `reach` tokens back; hidden states are logits.

    Where it finds nothing it guesses evenly. A picture is known by its pixels.
    """

    def __init__(self, vocab_size: int, reach: float = math.inf) -> None:
        super().__init__()
        self.vocab_size, self.reach = vocab_size, reach

    def encode(self, batch: PackedBatch) -> Tensor:
        keys: list[Any] = batch.input_ids.tolist()
        if "image" in batch.media:
            media = batch.media["image"]
            for slot, row in zip(media.slots.tolist(), media.rows.tolist(), strict=True):
                keys[slot] = media.values[row // media.num_tokens[0]].numpy().tobytes()
        logits = torch.rand(len(keys), self.vocab_size, generator=torch.Generator().manual_seed(0)) * 1e-3
        start = 0
        for length in batch.layout.lengths:
            last: dict[Any, int] = {}
            for place in range(start, start + length):
                before = last.get(keys[place])
                if before is not None and place - before <= self.reach:
                    logits[place, batch.input_ids[before + 1]] += 10
                last[keys[place]] = place
            start += length
        return logits

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recall")
    build_recall(out, lengths=(128, 512), tokens=1024, heldout_tokens=8192)
    return out


def run_tree(folder: Path, runs: Path) -> dict[str, Any]:
    held_out = {f"r{n}": {"shards": f"{folder}/heldout-{n}/*.tar", "objectives": ["recall"]} for n in (128, 512)}
    tower = {"image_size": 32, "shuffle": 2, "options": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    return {
        "run": {"name": "recall", "dir": str(runs)},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "context_length": 512,
            "bin_tokens": 2048,
            "sources": {"r": {"shards": f"{folder}/train-128/*.tar", "objectives": ["recall"]}},
        },
        "model": {"transformer": {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 32}, "image": tower},
        "objectives": {"recall": {"kind": "captioning"}},
        "eval": {"sources": held_out, "suites": ["recall"]},
    }


@pytest.fixture
def context(folder: Path, tmp_path: Path) -> EvalContext:
    config = build_config(RunConfig, run_tree(folder, tmp_path), "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model: Any = Oracle(len(data.tokenizer))
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def with_reach(context: EvalContext, reach: float) -> EvalContext:
    model: Any = Oracle(len(context.data.tokenizer), reach)
    return EvalContext(model, context.data, context.objectives, context.config, context.device)


def test_an_oracle_answers_everything_and_nothing_without_the_facts(context: EvalContext) -> None:
    found = evaluate(context, ["recall"])["recall"]
    assert list(found["lengths"]) == ["128", "512"]
    for length, per_document in (("128", 3), ("512", 12)):
        scores = found["lengths"][length]
        assert set(scores) == {"all", "recall", "needle", "picture", "depths"}
        assert scores["all"]["exact"] == scores["all"]["candidates"] == 1.0
        assert (
            scores["all"]["n"] == 8192 // int(length) * per_document == sum(d["n"] for d in scores["depths"].values())
        )
        assert scores["all"]["log_prob"] > -0.01
        assert passes(scores["all"])
    controls = found["controls"]
    assert controls["alone"]["exact"] == 1.0
    chance = controls["removed"]["chance"]
    low, high = wilson_interval(
        round(controls["removed"]["candidates"] * controls["removed"]["n"]), controls["removed"]["n"]
    )
    assert low <= chance <= high
    assert controls["removed"]["exact"] < 0.05  # of the whole vocabulary


def test_a_short_memory_recalls_what_is_near(context: EvalContext) -> None:
    """An oracle of 200 tokens' reach: perfect at 128 tokens, and at 512 on late facts alone."""
    found = evaluate_recall(with_reach(context, 200))["lengths"]
    assert found["128"]["all"]["exact"] == 1.0
    depths = found["512"]["depths"]
    assert depths["0.8-1"]["exact"] == 1.0
    assert depths["0-0.2"]["exact"] < 0.1
    assert found["512"]["all"]["exact"] == pytest.approx(200 / 512, abs=0.1)
    assert not passes(found["512"]["all"])


def test_heat_maps_show_where_memory_ends_for_each_kind(context: EvalContext) -> None:
    found = evaluate_recall(with_reach(context, 200))
    for kind in ("recall", "needle", "picture"):
        heat = found["heat"][kind]
        assert list(heat) == ["128", "512"]
        assert all(cell["exact"] == 1.0 for cell in heat["128"].values())
        row = heat["512"]
        assert row["0.8-1"]["exact"] == 1.0
        assert row["0-0.2"]["exact"] < 0.15
        assert sum(cell["n"] for cell in row.values()) == found["lengths"]["512"][kind]["n"]


def test_excerpts_keep_pictures_in_their_place(context: EvalContext) -> None:
    quiz = load_quizzes(context)[0]
    document = quiz.document
    assert document.media
    whole = excerpt(document, [(0, len(document.input_ids))])
    np.testing.assert_array_equal(whole.input_ids, document.input_ids)
    assert whole.media == document.media
    removed = without_facts(quiz)
    asked = Counter(question.answer for question in quiz.questions)
    assert len(removed.document.input_ids) == len(document.input_ids) - sum(
        q.fact[1] - q.fact[0] for q in quiz.questions
    )
    for question in removed.questions:
        assert removed.document.input_ids[question.ask[1] - 1] == question.answer
    placeholder = context.data.tokenizer.placeholder_ids["image"]
    for at, item in removed.document.media:
        assert (removed.document.input_ids[at : at + item.num_tokens] == placeholder).all()
    assert sum(asked.values()) == len(removed.questions)


def test_documents_of_other_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    tree = run_tree(folder, tmp_path)
    tree["model"]["image"]["shuffle"] = 1  # four embeddings a picture, the documents were built for one
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model: Any = Oracle(len(data.tokenizer))
    context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
    with pytest.raises(DataError, match=r"tokens, but was built for 128: .* picture_tokens"):
        evaluate_recall(context)


def test_other_documents_have_no_questions(tree: dict[str, Any]) -> None:
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model: Any = Oracle(len(data.tokenizer))
    assert evaluate_recall(EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))) == {}


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (171, 200), (1, 4000)])
def test_intervals_hold_the_shares_that_a_normal_test_does_not_reject(successes: int, n: int) -> None:
    """Wilson's definition: the shares p with |successes / n - p| <= z * sqrt(p (1 - p) / n), here found by trying them."""
    p = np.linspace(0, 1, 2_000_001)
    kept = p[np.abs(successes / n - p) <= 1.959964 * np.sqrt(p * (1 - p) / n) + 1e-12]
    assert wilson_interval(successes, n) == pytest.approx((kept.min(), kept.max()), abs=1e-5)


def test_the_report_draws_a_line_for_each_stage(context: EvalContext) -> None:
    short, full = (evaluate_recall(with_reach(context, reach)) for reach in (200, math.inf))
    stages = [
        {
            "step": n,
            "label": f"after stage {n} <b>",
            "lengths": {length: f["all"] for length, f in found["lengths"].items()},
            "heat": found["heat"],
        }
        for n, found in enumerate((short, full))
    ]
    section = recall_section({**full, "stages": stages})
    assert section is not None
    curve, kinds = (part for part in section.parts if isinstance(part, Lines | Table))
    svg = draw_lines(curve)
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 4
    assert "<b>" not in svg
    assert [row.cells[-1].text for row in kinds.rows] == ["yes", "yes"]
    maps = {part.name: part for part in section.parts if isinstance(part, HeatMap)}
    assert len(maps) == 1 + 2 * 3  # of all kinds together, and of each kind after each stage
    # the start of the longer documents, which the shorter memory does not reach
    near, far = (maps[f"heat picture after stage {n} <b>"].values[0][1] for n in (0, 1))
    assert near is not None
    assert far is not None
    assert (near.share, far.share) == (pytest.approx(0, abs=0.15), 1.0)
    assert recall_section({}) is None
