"""The suite that CONTRIBUTING.md walks through works as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.eval import SUITES, EvalContext, Suite, evaluate
from mmctx.pack import PackedBatch
from mmctx.train.config import RunConfig


class Teller(nn.Module):
    """Knows every label, or none; hidden states are logits."""

    def __init__(self, vocab_size: int, knows: bool) -> None:
        super().__init__()
        self.vocab_size, self.knows = vocab_size, knows

    def encode(self, batch: PackedBatch) -> Tensor:
        told = batch.labels.clamp(min=0) + (not self.knows)
        return nn.functional.one_hot(told, self.vocab_size + 1).float()

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_the_example_is_a_suite(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (code,) = [block for block in blocks if "def evaluate_first_token" in block]
    (tmp_path / "first_token.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SUITES, "first_token", Suite(importlib.import_module("first_token").evaluate_first_token))
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    for knows in (True, False):
        model: Any = Teller(len(data.tokenizer), knows)
        context = EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))
        found = evaluate(context, ["first-token"])
        assert found["first_token"] == {"accuracy": float(knows), "n": 32}  # a picture and a clip of 16 samples each
        two = on_two_ranks(context, lambda one: evaluate(one, ["first-token"]))
        assert list(two) == [found, found]
