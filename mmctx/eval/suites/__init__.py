"""The suites, by name. Adding one is one file here and one entry in `SUITES`; CONTRIBUTING walks through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mmctx.eval.config import EvalConfig
from mmctx.eval.context import EvalContext
from mmctx.eval.haystack.grid import grid_headline
from mmctx.eval.haystack.sources import check_haystack
from mmctx.eval.packages import require
from mmctx.eval.suites.attribution import attribution_headline, evaluate_attribution
from mmctx.eval.suites.caption import evaluate_caption
from mmctx.eval.suites.classification import classification_headline, evaluate_classification
from mmctx.eval.suites.loss import evaluate_loss
from mmctx.eval.suites.loss_by_position import evaluate_loss_by_position, position_headline
from mmctx.eval.suites.masked_lm import evaluate_masked_lm
from mmctx.eval.suites.needle import evaluate_needle
from mmctx.eval.suites.next_sentence import evaluate_next_sentence
from mmctx.eval.suites.passkey import evaluate_passkey
from mmctx.eval.suites.probe import check_probe, evaluate_probe, probe_headline
from mmctx.eval.suites.recall import evaluate_recall, recall_headline
from mmctx.eval.suites.regression import evaluate_regression, regression_headline
from mmctx.eval.suites.retrieval import evaluate_retrieval, retrieval_headline
from mmctx.eval.suites.robustness import evaluate_robustness, robustness_headline
from mmctx.eval.suites.sts import check_sts, evaluate_sts, sts_headline
from mmctx.eval.suites.swapped_media import evaluate_swapped_media, swapped_headline
from mmctx.eval.suites.world import evaluate_world
from mmctx.eval.suites.zero_shot import check_zero_shot, evaluate_zero_shot, zero_shot_headline


def shallow_numbers(results: Mapping[str, Any], depth: int = 2) -> dict[str, float]:
    """The finite numbers of nested results, down to `depth` levels, named `a/b`; counts (`n`) are left out."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping) and depth > 1:
            found |= {f"{name}/{inner}": number for inner, number in shallow_numbers(value, depth - 1).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "n" and math.isfinite(value):
            found[name] = value
    return found


def _nothing_to_check(config: EvalConfig) -> None:
    """The suite reads the held-out sources alone."""


class Suite(NamedTuple):
    """One way to look at a model.

    Attributes:
        run: gives the suite's results, which JSON can hold; empty where the held-out data have nothing to ask.
        headline: the few numbers of these results that a line of metrics.jsonl and the terminal show.
        check: raises what the suite would fail for, such as a file that is not there: asked before a run trains for it.
    """

    run: Callable[[EvalContext], dict[str, Any]]
    headline: Callable[[Mapping[str, Any]], dict[str, float]] = shallow_numbers
    check: Callable[[EvalConfig], None] = _nothing_to_check


SUITES: dict[str, Suite] = {
    "loss": Suite(evaluate_loss),
    "loss_by_position": Suite(evaluate_loss_by_position, position_headline),
    "retrieval": Suite(evaluate_retrieval, retrieval_headline),
    "caption": Suite(evaluate_caption, check=lambda config: require("jiwer", "pycocoevalcap")),
    "masked_lm": Suite(evaluate_masked_lm),
    "next_sentence": Suite(evaluate_next_sentence),
    "classification": Suite(evaluate_classification, classification_headline),
    "regression": Suite(evaluate_regression, regression_headline, lambda config: require("scipy")),
    "recall": Suite(evaluate_recall, recall_headline),
    "needle": Suite(evaluate_needle, grid_headline, lambda config: check_haystack(config.needle.haystack)),
    "passkey": Suite(evaluate_passkey, grid_headline, lambda config: check_haystack(config.passkey.haystack)),
    "world": Suite(evaluate_world, grid_headline, lambda config: check_haystack(config.world.haystack)),
    "zero_shot": Suite(evaluate_zero_shot, zero_shot_headline, check_zero_shot),
    "swapped_media": Suite(evaluate_swapped_media, swapped_headline),
    "sts": Suite(evaluate_sts, sts_headline, check_sts),
    "probe": Suite(evaluate_probe, probe_headline, check_probe),
    "robustness": Suite(evaluate_robustness, robustness_headline),
    "attribution": Suite(evaluate_attribution, attribution_headline),
}


def headlines(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The headline of each suite that has results."""
    found = {name: suite.headline(results[name]) for name, suite in SUITES.items() if results.get(name)}
    return {name: numbers for name, numbers in found.items() if numbers}
