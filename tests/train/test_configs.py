"""Every shipped YAML is a valid configuration whose model builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmctx.config import load_config
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def test_there_are_configs() -> None:
    assert any(path.name == "demo.yaml" for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path: Path) -> None:
    config = load_config(RunConfig, path)
    model = build_model(config, vocab_size=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert set(model.objectives) == set(config.objectives)
