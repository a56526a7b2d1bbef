"""Suite `loss_by_position` against models whose use of context is known: one that needs a whole period, one that needs nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, triple, write_shard
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.intervals import mean_of_documents
from mmctx.eval.suites.loss_by_position import first_target, shuffled_pieces
from mmctx.eval.token_losses import token_losses
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

ROUND = 40  # words until a text begins again


class Copier(nn.Module):
    """Expects the token that stood `period` tokens before the next one, if it has read that far; hidden states are logits."""

    def __init__(self, vocab_size: int, period: int) -> None:
        super().__init__()
        self.vocab_size, self.period = vocab_size, period

    def encode(self, batch: PackedBatch) -> Tensor:
        logits = torch.zeros(batch.num_tokens, self.vocab_size)
        for place, position in enumerate(batch.position_ids.tolist()):
            if position + 1 >= self.period:
                logits[place, batch.input_ids[place + 1 - self.period]] = 12.0
        return logits

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        return hidden


def periodic(seed: int, rounds: int) -> dict[str, Any]:
    words = np.random.default_rng(seed).choice(WORDS, ROUND).tolist()
    return {"__key__": f"round{seed}", "txt": " ".join(words * rounds).encode()}


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    """Periodic texts of about 120 and 200 tokens."""
    write_shard(tmp_path / "h.tar", [periodic(n, 3 + 2 * (n % 2)) for n in range(10)])
    tree["data"]["context_length"] = 256
    tree["eval"] |= {
        "sources": {"rounds": {"shards": str(tmp_path / "h.tar"), "objectives": ["captioning"]}},
        "loss_by_position": {"documents": 5, "targets": 8, "kept": [16, 64, 128]},
    }
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model: Any = Copier(len(data.tokenizer), ROUND)
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def results(context: EvalContext) -> dict[str, Any]:
    return evaluate(context, ["loss-by-position"])["loss_by_position"]


def test_a_model_that_needs_a_period_needs_it_kept(context: EvalContext) -> None:
    lengths = [len(context.data.dataset.documents(0, n, 0)[0].input_ids) for n in range(10)]
    assert sorted(set(lengths)) == [3 * ROUND + 1, 5 * ROUND + 1]  # one token a word, and the end
    found = results(context)
    uniform = math.log(context.model.vocab_size)
    curve = found["modalities"]["all"]
    assert curve["edges"][:4] == [[0, 16], [16, 32], [32, 64], [64, 128]]
    assert curve["mean"][:2] == pytest.approx([uniform, uniform])  # nothing to copy yet
    assert curve["mean"][3] < 0.2  # but for the end of the shorter texts
    assert sum(curve["n"]) == sum(lengths) - 10
    assert found["modalities"].keys() == {"all", "text"}
    for name in ("truncation", "shuffle"):
        part = found[name]
        assert part["kept"] == [16, 64, 128]
        assert part["documents"] == [5, 5, 5]  # the longest ones
        # seven of the eight predictions are copies, the last is the end of the text
        assert part["excess"][0] > 0.5 * uniform, name
        assert part["excess"][1:] == [0.0, 0.0], name
        assert part["mean"][1] == part["whole"][1]
    assert found["shuffle"]["excess"][0] != found["truncation"]["excess"][0]


def test_a_model_that_forgets_everything_gains_nothing(context: EvalContext) -> None:
    class Blind(Copier):
        def encode(self, batch: PackedBatch) -> Tensor:
            return nn.functional.one_hot(batch.input_ids, self.vocab_size).float()

    model: Any = Blind(context.model.vocab_size, 0)
    found = results(replace(context, model=model))
    assert found["truncation"]["excess"] == found["shuffle"]["excess"] == [0.0] * 3
    curve = found["modalities"]["all"]
    assert max(curve["mean"]) - min(curve["mean"]) < 0.2


def test_two_ranks_give_exactly_the_numbers_of_one(context: EvalContext) -> None:
    alone = evaluate(context, ["loss_by_position"])
    found = on_two_ranks(context, lambda one: evaluate(one, ["loss_by_position"]))
    assert list(found) == [alone, alone]


@pytest.mark.slow
def test_the_losses_are_those_of_the_objective(tree: dict[str, Any]) -> None:
    """A real model, with pictures and sound: the sum over positions is what the suite `loss` finds by the objective's own code."""
    tree["eval"]["loss_by_position"] = {"documents": 4, "targets": 2, "kept": [1, 2, 5]}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer))
    model.vocab_size = len(model.head_weight)  # in training the rows that only fill up the matrix count as well
    context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
    found = evaluate(context, ["loss", "loss_by_position"])
    loss, curves = found["loss"]["captioning"], found["loss_by_position"]["modalities"]
    total = sum(mean * n for mean, n in zip(curves["all"]["mean"], curves["all"]["n"], strict=True))
    assert sum(curves["all"]["n"]) == loss["n"]
    assert total / loss["n"] == pytest.approx(loss["held_out"], rel=1e-5)
    assert {"image", "audio"} < curves.keys()
    assert sum(sum(curve["n"]) for kind, curve in curves.items() if kind != "all") == loss["n"]
    assert found["loss_by_position"]["truncation"]["documents"]


def test_pieces_cover_the_far_context_once() -> None:
    picture = MediaItem("image", torch.zeros(3, 4, 4, dtype=torch.uint8), 9)
    ids = np.arange(100)
    document = Document("captioning", ids, ids, causal=True, media=((20, picture), (40, picture)))
    pieces = shuffled_pieces(document, 80, np.random.default_rng(0))
    assert sorted(place for start, end in pieces for place in range(start, end)) == list(range(80))
    assert (20, 29) in pieces
    assert (40, 49) in pieces
    assert pieces != sorted(pieces)


def test_targets_are_the_last_labelled_positions() -> None:
    labels = np.array([IGNORE_INDEX, 1, 2, IGNORE_INDEX, 3, IGNORE_INDEX])
    document = Document("captioning", np.zeros(6, np.int64), labels, causal=True)
    assert [first_target(document, n) for n in (1, 2, 5)] == [4, 2, 1]
    assert first_target(replace(document, labels=np.full(6, IGNORE_INDEX)), 1) is None


def test_intervals_take_documents_as_independent() -> None:
    """Against the bootstrap over documents."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 300)
    sums = counts * (2 + rng.normal(0, 0.5, 300)) + rng.normal(0, 1, 300)
    parts = list(zip(sums.tolist(), counts.tolist(), strict=True))
    found = mean_of_documents(parts)
    draws = rng.integers(0, 300, (2000, 300))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found["mean"] == pytest.approx(sums.sum() / counts.sum())
    assert found["high"] - found["low"] == pytest.approx(high - low, rel=0.1)
    assert mean_of_documents(parts[:1])["low"] is None


def test_losses_of_packed_documents_keep_their_order(context: EvalContext) -> None:
    documents = [context.data.dataset.documents(0, n, 0)[0] for n in range(6)]
    together = token_losses(context, documents)
    for document, losses in zip(documents, together, strict=True):
        (alone,) = token_losses(context, [document])
        torch.testing.assert_close(losses, alone, rtol=0, atol=0)


def test_triples_have_no_long_context(tree: dict[str, Any], tmp_path: Path) -> None:
    write_shard(tmp_path / "h.tar", [triple(n) for n in range(3)])
    tree["eval"]["sources"] = {"t": {"shards": str(tmp_path / "h.tar"), "objectives": ["captioning"]}}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model: Any = Copier(len(data.tokenizer), 4)
    context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
    assert results(context)["truncation"]["kept"] == []
