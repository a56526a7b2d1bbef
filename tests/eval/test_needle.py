"""Suites `needle` and `passkey` between an oracle and a blind model, and what they say of a model that looks so far back and no farther."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Blind, Copier, Knowing
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.build.recall_words import save_tokenizer
from mmctx.errors import ConfigError
from mmctx.eval import EvalContext, evaluate, headlines
from mmctx.eval.haystack.config import NEEDLE_KINDS, NeedleConfig
from mmctx.eval.heat_map import effective, passes
from mmctx.eval.intervals import longest_passing, longest_unbroken
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

GRID = {"lengths": [768, 1024], "depths": [0, 0.5, 1], "samples": 3, "candidates": 4}


def make_context(tree: dict[str, Any], **model: Any) -> EvalContext:
    tree["data"] |= {"context_length": 1024, "bin_tokens": 4096}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    blind: Any = Blind(len(data.tokenizer))
    return EvalContext(blind, data, config.objectives, config.eval, torch.device("cpu"))


@pytest.fixture
def context(tree: dict[str, Any]) -> EvalContext:
    tree["eval"] |= {"needle": GRID | {"digits": 4}, "passkey": GRID, "world": GRID}
    return make_context(tree)


def run(context: EvalContext, model: Any, *suites: str) -> dict[str, Any]:
    return evaluate(replace(context, model=model), suites)


def at_chance(share: float, chance: float, n: int) -> bool:
    return abs(share - chance) <= 4 * math.sqrt(chance * (1 - chance) / n)


@pytest.mark.slow
def test_an_oracle_answers_everything_and_nothing_without_the_needles(context: EvalContext) -> None:
    found = run(context, Knowing(context), "needle", "passkey", "world")
    removed = []
    for suite in ("needle", "passkey", "world"):
        results = found[suite]
        assert results["left_out"] == []
        for kind, part in results["kinds"].items():
            for length in ("768", "1024"):
                scores = part["lengths"][length]
                assert scores["share"] == scores["exact"] == scores["complete"] == 1.0, (kind, length)
                assert scores["n"] == 9
                several = kind in ("multi_value", "multi_query", "variable_tracking", "common_words", "frequent_words")
                assert scores["log_prob"] > (-2 if several else -0.5)  # three right answers share the probability
            assert part["controls"]["alone"]["share"] == part["controls"]["alone"]["exact"] == 1.0, kind
            gone = part["controls"]["removed"]
            assert at_chance(gone["share"], gone["chance"], gone["n"]), kind
            assert gone["exact"] < 0.2
            removed.append(gone)
            assert part["effective"] == {
                rule: {"length": 1024, "low": 0, "high": 1024} for rule in ("ruler", "strict", "exact")
            }  # nine documents cannot say that a share is above 85.6% for sure
        assert results["effective"]["ruler"]["length"] == results["effective"]["strict"]["length"] == 1024
        assert headlines(found)[suite] == {"768": 1.0, "1024": 1.0, "effective": 1024.0}
    assert set(found["needle"]["kinds"]) == set(NEEDLE_KINDS)
    n = sum(gone["n"] for gone in removed)
    together = float(np.average([gone["share"] for gone in removed], weights=[gone["n"] for gone in removed]))
    chance = float(np.average([gone["chance"] for gone in removed], weights=[gone["n"] for gone in removed]))
    assert n == 22 * 9
    assert at_chance(together, chance, n)


def test_a_blind_model_is_at_chance_everywhere(context: EvalContext) -> None:
    found = run(context, context.model, "needle", "passkey", "world")
    shares, chances, n = [], [], 0
    for suite in ("needle", "passkey", "world"):
        for part in found[suite]["kinds"].values():
            for scores in (*part["lengths"].values(), *part["controls"].values()):
                assert scores["exact"] == 0.0
                assert scores["log_prob"] == pytest.approx(np.log(scores["chance"]), abs=1e-6) or scores["chance"] < 0.3
                shares.append(scores["share"] * scores["n"])
                chances.append(scores["chance"] * scores["n"])
                n += scores["n"]
        assert found[suite]["effective"]["ruler"]["length"] == 0
        assert found[suite]["effective"]["strict"]["length"] == 0
    assert at_chance(sum(shares) / n, sum(chances) / n, n)


@pytest.mark.parametrize("window", [500, 900, 2000])
def test_a_window_is_found_within_one_step_of_the_grid(tree: dict[str, Any], window: int) -> None:
    """A model that sees `window` tokens back: the effective length is the grid's last that it holds, or one beside it, where a needle
    in five is just out of sight and guessed.
    """
    lengths = [256, 512, 1024, 2048]
    grid = GRID | {"lengths": lengths, "depths": [0, 0.25, 0.5, 0.75, 1], "samples": 2}
    kinds = ["single", "picture_value", "sound", "multi_value"]
    tree["eval"] |= {"needle": grid | {"digits": 4, "kinds": kinds, "needles": 2}, "passkey": grid}
    tree["eval"]["world"] = grid | {"tasks": ["has"], "facts": 4}
    context = make_context(tree)
    found = run(context, Knowing(context, window), "needle", "passkey", "world")
    step = sum(length <= window for length in lengths)
    near = set(lengths[max(step - 2, 0) : step + 1])
    for suite in ("needle", "passkey", "world"):
        for kind, part in found[suite]["kinds"].items():
            for rule in ("ruler", "strict", "exact"):
                assert part["effective"][rule]["length"] in near, (kind, rule)
            if kind == "single":
                heat = part["heat"]["2048"]
                assert heat["1"]["share"] == 1.0  # what stands right before the question is seen
                if window < 2000:
                    assert heat["0"]["share"] < 0.9
        assert found[suite]["effective"]["strict"]["length"] in near


def test_a_model_that_copies_answers_what_can_be_copied(context: EvalContext) -> None:
    """It knows nothing of the suites: the documents themselves tell the answers, also at a known reach."""
    kinds = ("single", "multi_key", "picture_key", "sound_key")
    config = context.config.model_copy(update={"needle": context.config.needle.model_copy(update={"kinds": kinds})})
    context = replace(context, config=config)
    vocab_size = len(context.data.tokenizer)
    found = run(context, Copier(vocab_size), "needle", "passkey")
    for part in (*found["needle"]["kinds"].values(), *found["passkey"]["kinds"].values()):
        assert all(scores["share"] == scores["exact"] == 1.0 for scores in part["lengths"].values())
        assert part["controls"]["alone"]["share"] == 1.0
        gone = part["controls"]["removed"]
        assert at_chance(gone["share"], gone["chance"], gone["n"])
    near = run(context, Copier(vocab_size, 300), "needle")["needle"]["kinds"]
    for part in near.values():
        assert part["heat"]["1024"]["1"]["share"] == 1.0
        assert part["heat"]["1024"]["0"]["share"] < 1.0
        assert part["effective"]["ruler"]["length"] == 0


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tree: dict[str, Any]) -> None:
    grid = {"lengths": [512], "depths": [0.2, 0.9], "samples": 2, "candidates": 3}
    kinds = ["single", "multi_query", "picture", "sound_count", "picture_sound"]
    tree["eval"] |= {"needle": grid | {"digits": 3, "needles": 2, "kinds": kinds}, "passkey": grid, "world": grid}
    context = make_context(tree)
    config = build_config(RunConfig, tree, "tree")
    torch.manual_seed(0)
    model = build_model(config, len(context.data.tokenizer)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    context = replace(context, model=model)
    suites = ["needle", "passkey", "world"]
    alone = evaluate(context, suites)
    assert {kind: part["lengths"]["512"]["n"] for kind, part in alone["needle"]["kinds"].items()} == dict.fromkeys(
        kinds, 4
    )
    for together in on_two_ranks(context, lambda one: evaluate(one, suites)):
        assert together == alone


@pytest.mark.slow
def test_a_real_model_is_asked_in_the_precision_of_its_run(tree: dict[str, Any]) -> None:
    kinds = ["single", "picture_count", "sound_value"]
    tree["eval"] |= {"needle": GRID | {"lengths": [512], "kinds": kinds, "digits": 3}}
    tree["model"]["transformer"] |= {"windows": [64, None]}
    context = make_context(tree)
    torch.manual_seed(0)
    model = build_model(build_config(RunConfig, tree, "tree"), len(context.data.tokenizer))
    whole, half = (evaluate(replace(context, model=model, bf16=bf16), ["needle"])["needle"] for bf16 in (False, True))
    for kind in kinds:
        exact, rough = (found["kinds"][kind]["lengths"]["512"] for found in (whole, half))
        assert exact["n"] == rough["n"] == 9
        assert rough["log_prob"] == pytest.approx(exact["log_prob"], rel=0.02)
        assert rough["log_prob"] != exact["log_prob"]


def test_what_cannot_be_asked_is_said(tree: dict[str, Any], tmp_path: Path) -> None:
    grid = GRID | {"lengths": [64, 768], "digits": 4}
    tree["eval"] |= {"needle": grid | {"kinds": ["single", "sound", "picture_sound", "picture"], "candidates": 30}}
    tree["model"]["audio"] = None
    tree["objectives"]["similarity"]["pairs"] = [["image", "text0"]]
    results = evaluate(make_context(tree), ["needle"])["needle"]
    assert set(results["kinds"]) == {"single"}
    reasons = {(left["kind"], left["length"]): left["reason"] for left in results["left_out"]}
    assert set(reasons) == {("single", 64), ("picture", None), ("sound", None), ("picture_sound", None)}
    assert "needs" in reasons["single", 64]
    assert reasons["sound", None] == "the model has no encoder of sound: model.audio is null"
    assert "needs 30 pictures with names of their own; the held-out samples have 1" in reasons["picture", None]


def test_a_tokenizer_without_the_words_is_said(tree: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "words")
    tree["data"]["tokenizer"] = str(tmp_path / "words")
    results = evaluate(make_context(tree), ["passkey"])["passkey"]
    assert results["kinds"] == {}
    assert results["left_out"] == [
        {"kind": "passkey", "length": None, "reason": "the tokenizer has no tokens for 'The pass key is'"}
    ]
    assert headlines({"passkey": results}) == {}


def test_without_generation_nothing_is_written(tree: dict[str, Any]) -> None:
    tree["eval"] |= {"passkey": GRID | {"generate": False}}
    results = evaluate(make_context(tree), ["passkey"])["passkey"]
    assert "exact" not in results["lengths"]["768"]
    assert set(results["effective"]) == {"ruler", "strict"}
    assert results["examples"][0]["prediction"] == ""


def test_a_run_that_learns_no_text_is_not_asked(tree: dict[str, Any]) -> None:
    for source in (*tree["data"]["sources"].values(), *tree["eval"]["sources"].values()):
        source["objectives"] = ["masked_lm"]
    tree["objectives"] = {"masked_lm": {"kind": "masked_lm"}}
    found = evaluate(make_context(tree), ["needle", "passkey", "world"])
    assert found["needle"] == found["passkey"] == found["world"] == {}


@pytest.mark.parametrize(
    ("context_length", "lengths"),
    [(100, (100,)), (256, (256,)), (2047, (256, 512, 1024)), (2048, (256, 512, 1024, 2048))],
)
def test_lengths_are_powers_of_two_up_to_the_context(context_length: int, lengths: tuple[int, ...]) -> None:
    assert NeedleConfig().resolved_lengths(context_length) == lengths
    assert NeedleConfig(lengths=(300, 5000)).resolved_lengths(context_length) == (300, 5000)


def test_unknown_kinds_and_unordered_grids_are_errors(tree: dict[str, Any]) -> None:
    tree["eval"]["needle"] = {"kinds": ["singel"]}
    with pytest.raises(ConfigError, match="single"):
        build_config(RunConfig, tree, "tree")
    tree["eval"]["needle"] = {"lengths": [512, 256]}
    with pytest.raises(ConfigError, match="rising order"):
        build_config(RunConfig, tree, "tree")


def test_effective_lengths_by_both_rules() -> None:
    shares = {256: 1.0, 512: 0.8, 1024: 0.9, 2048: 0.2}
    above = dict.fromkeys(shares, True)
    assert longest_passing(shares) == 1024  # RULER's rule forgives the dip
    assert longest_unbroken(shares, above) == 256
    assert longest_unbroken(shares, above | {256: False}) == 0
    assert longest_passing({256: 0.855}) == 0
    assert longest_unbroken({}, {}) == longest_passing({}) == 0

    def scores(share: float, low: float, high: float) -> dict[str, float]:
        return {"share": share, "low": low, "high": high, "chance": 0.25}

    found = effective({"256": scores(0.99, 0.9, 1.0), "512": scores(0.9, 0.8, 0.95), "1024": scores(0.7, 0.6, 0.86)})
    assert found["ruler"] == {"length": 512, "low": 256, "high": 1024}
    assert found["strict"] == {"length": 512, "low": 256, "high": 1024}
    assert passes(scores(0.9, 0.8, 1.0))
    assert not passes(scores(0.9, 0.2, 1.0))
