"""Settings of single modules: which are known, which counts, what freezing does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.optim.modules import ModuleConfig, Settings, freeze, merged, settings_of


def test_an_unknown_module_is_an_error_that_names_near_ones(tree: dict[str, Any]) -> None:
    tree["train"]["modules"] = {"encoders.imge": {"freeze": True}}
    with pytest.raises(
        ConfigError, match=r"train\.modules: .* no module 'encoders\.imge'; did you mean 'encoders\.image'\? .*audio"
    ):
        build_model(build_config(RunConfig, tree, "tree"), 323)
    tree["train"]["modules"] = {"xyz": {"freeze": True}}
    with pytest.raises(ConfigError, match=r"there are embedding, encoders, trunk, objectives"):
        build_model(build_config(RunConfig, tree, "tree"), 323)


def test_a_stage_that_names_an_unknown_module_or_freezes_all_is_an_error(tree: dict[str, Any]) -> None:
    del tree["train"]["steps"]
    tree["schedule"] = [{"steps": 1}, {"steps": 1, "modules": {"trunc": {"freeze": True}}}]
    with pytest.raises(ConfigError, match=r"schedule\.1\.modules: .*'trunc'; did you mean 'trunk'"):
        build_model(build_config(RunConfig, tree, "tree"), 323)
    every = ("trunk", "embedding", "encoders", "objectives")
    tree["schedule"][1]["modules"] = {path: {"freeze": True} for path in every}
    with pytest.raises(ConfigError, match=r"schedule\.1\.modules: every parameter is frozen"):
        build_model(build_config(RunConfig, tree, "tree"), 323)


def test_inner_modules_override_outer_ones_field_by_field() -> None:
    modules = {
        "encoders.image.projector": ModuleConfig(freeze=False),
        "encoders": ModuleConfig(lr_factor=0.5, weight_decay=0.0),
        "encoders.image": ModuleConfig(freeze=True),
    }
    assert settings_of("encoders.image.projector.1.weight", modules) == Settings(0.5, 0.0, False)
    assert settings_of("encoders.image.tower.x", modules) == Settings(0.5, 0.0, True)
    assert settings_of("encoders_of_others.x", modules) == Settings()
    changed = merged(modules, {"encoders.image": ModuleConfig(lr_factor=3.0), "trunk": ModuleConfig(freeze=True)})
    assert settings_of("encoders.image.tower.x", changed) == Settings(3.0, 0.0, True)
    assert settings_of("trunk.x", changed) == Settings(freeze=True)


def test_a_stage_changes_what_it_names_and_keeps_the_rest(tree: dict[str, Any]) -> None:
    del tree["train"]["steps"]
    tree["train"]["modules"] = {"trunk": {"freeze": True}, "encoders.image": {"lr_factor": 0.1}}
    tree["schedule"] = [{"steps": 2}, {"steps": 2, "modules": {"trunk": {"freeze": False}}}]
    config = build_config(RunConfig, tree, "tree")
    model = build_model(config, 323)
    first, second = (stage.config.train.modules for stage in config.stages)
    assert freeze(model, first)
    assert {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad} == {"trunk"}
    assert not freeze(model, first)
    assert freeze(model, second)
    assert all(p.requires_grad for p in model.parameters())
    assert second["encoders.image"].lr_factor == 0.1
    assert json.dumps(config.stages[1].differences["modules"])
