"""The model card of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from mmctx import api
from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.eval.results import add_results
from mmctx.train.card import write_card
from mmctx.train.checkpoints.layout import resolve_checkpoint
from mmctx.train.checkpoints.saver import Saver
from mmctx.train.checkpoints.state import read_state
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

SAID = {
    "license": "apache-2.0",
    "data_licenses": {},
    "languages": ["en"],
    "intended_use": "For tests of | and nothing else.",
    "limits": ["It has seen noise alone."],
}


def test_a_card_says_what_the_run_did_and_what_people_said(tree: dict[str, Any]) -> None:
    tree["run"]["card"] = SAID | {"data_licenses": {min(tree["data"]["sources"]): "CC0"}}
    tree["train"]["steps"] = 2
    tree["eval"]["suites"] = ["loss"]
    run_dir = train(build_config(RunConfig, tree, "tree")).run_dir
    checkpoint = resolve_checkpoint(run_dir)
    card = ModelCard.load(checkpoint / "README.md")  # the hub's own reader
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.eval_results is None
    for said in (
        "For tests of | and nothing else.",
        "It has seen noise alone.",
        "| CC0 |",
        "not stated",
        "| steps | 2 |",
    ):
        assert said in card.text
    assert "Nothing was evaluated" in card.text
    found = api.evaluate(run_dir)
    card = ModelCard.load(checkpoint / "README.md")
    name, value = next((name, value) for name, value in found["loss"].items() if isinstance(value, dict))
    shown = {f"{result.task_type} {result.metric_type}": result.metric_value for result in card.data.eval_results}
    assert shown[f"loss {name}/held_out"] == pytest.approx(value["held_out"])
    assert resolve_checkpoint(run_dir) == checkpoint, "a renewed card does not make a checkpoint a damaged one"


def test_a_run_that_is_written_down_nowhere_has_a_card_too(tree: dict[str, Any]) -> None:
    tree["train"]["steps"] = 1
    tree["eval"]["sources"] = {}
    run_dir = train(build_config(RunConfig, tree, "tree")).run_dir
    (run_dir / "manifest.json").unlink()
    add_results(
        run_dir, {"step": 7, "tokens": 0, "weights": "trained", "train_seconds": 0.0, "skipped": {}, "loss": {}}
    )
    text = write_card(resolve_checkpoint(run_dir), run_dir).read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    assert "Not stated by whoever trained it." in text


def test_an_evaluation_damaged_on_the_way_costs_the_card_and_no_checkpoint(tree: dict[str, Any]) -> None:
    tree["train"]["steps"] = 1
    tree["eval"]["sources"] = {}
    run_dir = train(build_config(RunConfig, tree, "tree")).run_dir
    model, tokenizer, config = api.load_model(run_dir)
    state = read_state(resolve_checkpoint(run_dir))
    (run_dir / "eval.json").write_text("{")
    said: list[str] = []
    saver = Saver(run_dir, config, say=said.append)
    saver.save(model, tokenizer, torch.optim.SGD(model.parameters()), replace(state, step=2))
    saver.finish()
    assert resolve_checkpoint(run_dir).name == "checkpoint-2"
    assert not (run_dir / "checkpoint-2" / "README.md").exists()
    assert any("no model card could be written" in line and "eval.json" in line for line in said)


def test_a_licence_of_no_source_is_refused(tree: dict[str, Any]) -> None:
    tree["run"]["card"] = {"data_licenses": {"nowhere": "CC0"}}
    with pytest.raises(ConfigError, match=r"'nowhere', but data\.sources has"):
        build_config(RunConfig, tree, "tree")
