"""The objective that CONTRIBUTING.md walks through works as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.model import MmctxModel
from mmctx.objectives import KINDS, Kind, build_data_halves
from mmctx.objectives.token_loss import TokenLoss
from mmctx.pack import IGNORE_INDEX, pack_documents
from mmctx.train.config import RunConfig


def test_the_example_is_an_objective(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class FirstWord:" in block]
    (tmp_path / "first_word.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("first_word")
    monkeypatch.setitem(KINDS, "first_word", Kind(made.FirstWord, TokenLoss))
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    objectives = {"first": made.FirstWordConfig(label_smoothing=0.1)}
    half = build_data_halves(objectives, data.tokenizer)["first"]
    documents = []
    for number, table in enumerate(data.dataset.tables):
        pre, ids = table.preprocessors, np.arange(4)
        lengths = half.lengths(table.source.sizes(ids, pre.image_tokens, pre.audio_tokens))
        for sample_id in ids.tolist():
            sample = data.dataset.sample(number, sample_id)
            found = half.documents(sample, np.random.default_rng(0))
            assert [len(d.input_ids) for d in found] == [n for n in lengths[sample_id].tolist() if n]
            assert all((d.labels != IGNORE_INDEX).sum() == 1 for d in found)
            documents += found
    assert len(documents) == 4  # of triples; books have no picture of their own
    model = MmctxModel(config.model, objectives, len(data.tokenizer))
    loss = model.losses(pack_documents(documents, data.tokenizer.placeholder_ids))["first"]
    assert loss.count == 4
    assert torch.isfinite(loss.total)
