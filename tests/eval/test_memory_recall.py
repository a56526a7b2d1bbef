"""Suite `memory_recall` against an oracle that looks facts up, through its window alone where its memory is off."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recall import Oracle
from torch import Tensor
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.build.recall import build_recall
from mmctx.datasets.build.recall_words import SHOWN, VALUES
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.report.pieces import Lines, Table
from mmctx.eval.report.sections.memory_recall import memory_recall_section
from mmctx.eval.suites import headlines
from mmctx.eval.suites.recall import load_quizzes
from mmctx.layer_memory import LayerMemory
from mmctx.model import ModelConfig
from mmctx.pack import PackedBatch
from mmctx.train.config import RunConfig

WINDOW = 16


class Remembering(Oracle):
    """Sees everything while its memory is on, but what pictures stand for."""

    def __init__(self, vocab_size: int, config: ModelConfig) -> None:
        super().__init__(vocab_size)
        self.config = config
        trunk = config.transformer
        self.memory = LayerMemory(trunk.memory, trunk.rope, 2, 16) if trunk.memory is not None else None

    def encode(self, batch: PackedBatch) -> Tensor:
        self.reach = math.inf if self.memory is not None and self.memory.on else WINDOW
        return super().encode(batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recall")
    build_recall(out, lengths=(128, 512), tokens=1024, heldout_tokens=4096, picture_values=True)
    return out


def open_context(folder: Path, memory: dict[str, Any] | None, windows: list[int | None]) -> EvalContext:
    held_out = {f"r{n}": {"shards": f"{folder}/heldout-{n}/*.tar", "objectives": ["recall"]} for n in (128, 512)}
    tower = {"image_size": 32, "shuffle": 2, "options": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    trunk = {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 32, "windows": windows, "memory": memory}
    tree = {
        "run": {"name": "recall"},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "context_length": 512,
            "bin_tokens": 512,
            "sources": {"r": {"shards": f"{folder}/train-128/*.tar", "objectives": ["recall"]}},
        },
        "model": {"transformer": trunk, "image": tower},
        "objectives": {"recall": {"kind": "captioning"}},
        "eval": {"sources": held_out, "suites": ["memory_recall"]},
    }
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model: Any = Remembering(len(data.tokenizer), config.model)
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def test_pictures_are_values(folder: Path) -> None:
    """Stated as a picture, asked as the word that this picture stands for in every document."""
    context = open_context(folder, None, [WINDOW])
    quizzes = load_quizzes(context)
    assert Counter(q.kind for quiz in quizzes for q in quiz.questions).keys() == {"recall", "needle", "picture", SHOWN}
    ids = {int(i[0]) for i in context.data.tokenizer.encode_many(list(VALUES))}
    meaning: dict[bytes, int] = {}
    for quiz in quizzes:
        media = dict(quiz.document.media)
        for question in (q for q in quiz.questions if q.kind == SHOWN):
            key = quiz.document.input_ids[question.fact[0]]
            assert key == quiz.document.input_ids[question.ask[0]]
            assert (quiz.document.input_ids == key).sum() == 2  # nothing in between gives the answer
            assert question.answer in ids
            pixels = media[question.fact[1] - 1].values.numpy().tobytes()
            assert meaning.setdefault(pixels, question.answer) == question.answer
    assert len(meaning) > 20


def apart(context: EvalContext) -> Any:
    """Ranks are threads here, which must not switch off each other's memory."""
    return evaluate(replace(context, model=copy.deepcopy(context.model)), ["memory_recall"])["memory_recall"]


def test_an_oracle_with_a_memory_and_without(folder: Path) -> None:
    context = open_context(folder, {"layers": [1]}, [4, WINDOW])
    found = evaluate(context, ["memory-recall"])["memory_recall"]
    assert (found["window"], found["reach"]) == (WINDOW, 3 + WINDOW - 1)
    assert list(found["distances"]) == ["0", "1", "2", "4", "8", "16"]
    for back, modes in found["distances"].items():
        for kind in ("recall", "needle", "picture"):
            if int(back) and kind in modes["on"]:
                assert modes["on"][kind]["exact"] == 1.0
                assert modes["off"][kind]["exact"] < 0.2
        assert modes["on"]["all"]["n"] == modes["off"]["all"]["n"]
    far = found["distances"]["8"]["off"]["all"]
    assert far["low"] < 2 * far["chance"]
    asked = sum(len(quiz.questions) for quiz in load_quizzes(context))
    assert sum(modes["on"]["all"]["n"] for modes in found["distances"].values()) == asked
    assert context.model.memory.on  # as it was
    assert (
        headlines({"memory_recall": found})["memory_recall"]["8x/on"] == found["distances"]["8"]["on"]["all"]["exact"]
    )
    two = on_two_ranks(context, apart)
    assert list(two) == [found, found]
    section = memory_recall_section(found)
    assert section is not None
    curve, table = section.parts
    assert isinstance(curve, Lines)
    assert [list(series.x) for series in curve.series] == [[1, 2, 4, 8, 16]] * 2
    assert isinstance(table, Table)
    assert len(table.rows) == 12


def test_a_model_without_a_memory_is_asked_through_its_windows(folder: Path) -> None:
    found = evaluate(open_context(folder, None, [4, WINDOW]), ["memory-recall"])["memory_recall"]
    assert set(found["distances"]["8"]) == {"off"}
    assert memory_recall_section(found) is not None
    whole = evaluate(open_context(folder, None, [4, None]), ["memory-recall"])
    assert not whole.get("memory_recall")
    assert memory_recall_section({}) is None
