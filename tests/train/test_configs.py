"""Every shipped YAML is a valid configuration whose model builds, or one that `accelerate launch` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from mmctx.config import load_config
from mmctx.train.build import build_model
from mmctx.train.checkpoints.load import without_pretrained
from mmctx.train.config import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LAUNCHES = sorted((Path(__file__).parents[2] / "configs" / "accelerate").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert any(path.name == "demo.yaml" for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path: Path) -> None:
    config = load_config(RunConfig, path)
    config = config.model_copy(update={"model": without_pretrained(config.model)})  # no weights of others are at hand
    with torch.device("meta"):  # no weights: recipes are of full size
        model = build_model(config, vocab_size=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert set(model.objectives) == set(config.objectives)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_takes_its_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == {"one_gpu": 1, "eight_gpus": 8, "fsdp2": 8, "two_nodes": 16}[path.stem]
    assert config.num_machines == (2 if path.stem == "two_nodes" else 1)
    assert not getattr(config, "fsdp_config", None)  # mmctx splits the model itself


def test_there_is_a_launch_for_each_case() -> None:
    assert {path.stem for path in LAUNCHES} == {"one_gpu", "eight_gpus", "fsdp2", "two_nodes"}
