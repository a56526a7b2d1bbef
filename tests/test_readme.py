"""What the README tells people to type exists: commands, options, overrides, make targets, Python names, files."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import mmctx
from mmctx.cli import app
from mmctx.config import build_config, load_config
from mmctx.datasets.config import DataConfig
from mmctx.eval import known_suites
from mmctx.train.config import RunConfig
from mmctx.train.sweep.config import SweepConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
LINES = [line.split("#")[0].strip() for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("mmctx ")]


def test_there_is_something_to_test() -> None:
    assert len(COMMANDS) >= 6
    assert any(line.startswith("make demo") for line in LINES)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    command = typer.main.get_command(app)
    context = None
    words = shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    context = command.make_context(line, words)  # raises on unknown options or missing arguments
    overrides = context.params.get("overrides") or []
    config = context.params.get("config")
    if config is not None:
        load_config(SweepConfig if command.name == "sweep" else RunConfig, ROOT / config, overrides)
    assert context.command is command


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_python_names_exist() -> None:
    for source in [block for language, block in BLOCKS if language == "python"]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mmctx":
                assert node.attr in mmctx.__all__


def test_yaml_holds_together() -> None:
    """The sections are of one run; a section may be shown piece by piece."""
    sections: dict[str, Any] = {}
    for block in [block for language, block in BLOCKS if language == "yaml"]:
        join(sections, yaml.safe_load(block))
    assert sections.keys() == {"data", "schedule", "objectives", "augment", "train", "eval"}
    pairs = sections["data"]["sources"]["pairs"]
    pairs["augment"] = sections.pop("augment")
    config = build_config(DataConfig, sections["data"], "README.md")
    assert config.sources.keys() == sections["data"]["sources"].keys()
    run = {"run": {"name": "readme"}, "model": {}} | sections
    whole = build_config(RunConfig, run, "README.md")
    assert whole.train.distribution.kind == "fsdp2"
    assert whole.data.worker_timeout == 600
    assert known_suites(whole.eval.loop_suites) == ["loss", "loss_by_position"]
    first, second = whole.stages
    assert first.config.model.transformer.windows == (512, 512, None)
    assert second.config.data.context_length == 32768


def test_yaml_of_fine_tuning_holds_together() -> None:
    """It starts from a checkpoint that is not there: what it would say of the model is filled in."""
    (block,) = [block for language, block in BLOCKS if language == "yml"]
    tree = load_config(RunConfig, ROOT / "configs/demo.yaml").model_dump(mode="json") | {"schedule": []}
    tree["data"]["sources"] = {"talks": {"shards": "x.tar", "objectives": ["answers", "mood", "stars"]}}
    tree["eval"]["sources"], tree["run"] = {}, {"name": "readme"}
    tree |= yaml.safe_load(block)
    config = build_config(RunConfig, tree, "README.md")
    assert config.train.tune.kind == "lora"
    assert {objective.kind for objective in config.objectives.values()} == {
        "captioning",
        "classification",
        "regression",
    }


def join(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Adds a piece's keys to `whole`, in place; where a key is shown twice the later value holds."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            join(whole[key], value)
        else:
            whole[key] = value


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
