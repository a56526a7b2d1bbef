"""Evaluation: suites that run on any checkpoint. Adding one is one function and one entry in `SUITES`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmctx.errors import ConfigError
from mmctx.eval.caption import evaluate_caption
from mmctx.eval.context import EvalContext
from mmctx.eval.loss import evaluate_loss
from mmctx.eval.masked_lm import evaluate_masked_lm
from mmctx.eval.next_sentence import evaluate_next_sentence
from mmctx.eval.recall import evaluate_recall
from mmctx.eval.retrieval import evaluate_retrieval
from mmctx.eval.swapped_media import evaluate_swapped_media
from mmctx.eval.zero_shot import evaluate_zero_shot

SUITES: dict[str, Callable[[EvalContext], dict[str, Any]]] = {
    "loss": evaluate_loss,
    "retrieval": evaluate_retrieval,
    "caption": evaluate_caption,
    "masked_lm": evaluate_masked_lm,
    "next_sentence": evaluate_next_sentence,
    "recall": evaluate_recall,
    "zero_shot": evaluate_zero_shot,
    "swapped_media": evaluate_swapped_media,
}


def evaluate(context: EvalContext, suites: Sequence[str]) -> dict[str, Any]:
    """Runs suites by name and returns `{suite: its results}`, and under `skipped` how many held-out samples could not be used.

    Raises:
        ConfigError: a suite's name is unknown.
    """
    if unknown := [name for name in suites if name not in SUITES]:
        raise ConfigError(f"no evaluation suite named {unknown[0]!r}; there are {', '.join(SUITES)}")
    training = context.model.training
    context.model.eval()
    try:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=context.bf16):
            results = {name: SUITES[name](context) for name in suites}
    finally:
        context.model.train(training)
    return {**results, "skipped": count_skips(context)}


def count_skips(context: EvalContext) -> dict[str, int]:
    """Held-out samples that could not be used, by reason, each once."""
    found = {
        (skip.shard, skip.key): skip.reason
        for skip in (*context.data.left_out(), *context.data.dataset.undecodable.values())
    }
    return dict(Counter(found.values()))


__all__ = ["SUITES", "EvalContext", "count_skips", "evaluate"]
