"""Optimizers: groups, states that survive a regrouping, and one step against independent implementations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers.optimization import Adafactor

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.model import MmctxModel
from mmctx.train.build import build_model
from mmctx.train.checkpoints.optimizer_state import named_state, restore_state
from mmctx.train.config import RunConfig
from mmctx.train.optim.config import AdafactorConfig, AdamWConfig, MuonConfig, OptimizerConfig
from mmctx.train.optim.modules import ModuleConfig, freeze
from mmctx.train.optim.optimizer import build_optimizer, set_groups, state_shapes

KINDS = [AdamWConfig(), AdafactorConfig(), MuonConfig()]


@pytest.fixture(scope="module")
def model(corpus) -> MmctxModel:
    from tiny import tiny_tree

    return build_model(build_config(RunConfig, tiny_tree(corpus, corpus / "runs"), "tree"), 323)


def set_gradients(model: nn.Module, seed: int, skip: str = "nothing") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name.startswith(skip) else gradient


def train(model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizerConfig, seeds: range, **kw: Any) -> None:
    for seed in seeds:
        set_gradients(model, seed, **kw)
        set_groups(optimizer, config, {}, config.lr)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def groups_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def test_decay_is_on_matrices_and_muon_on_linear_layers_of_trunk_and_encoders(model: MmctxModel) -> None:
    config = MuonConfig(weight_decay=0.3)
    optimizer = build_optimizer(model, config)
    set_groups(optimizer, config, {}, 0.5)
    found = groups_by_name(optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert found[name]["weight_decay"] == (0.3 if parameter.ndim >= 2 and name != "embedding.weight" else 0), name
        assert found[name]["lr"] == 0.5
    orthogonal = {name for name, group in found.items() if group["muon"]}
    assert {"trunk.blocks.0.attention.qkv.weight", "encoders.image.projector.1.weight"} <= orthogonal
    assert {"encoders.audio.convs.0.linear.weight", "encoders.image.tower.model.blocks.0.mlp.fc1.weight"} <= orthogonal
    plain = found.keys() - orthogonal
    assert {"embedding.weight", "objectives.similarity.projection.weight", "trunk.norm.weight"} <= plain
    assert {"encoders.image.tower.model.pos_embed", "encoders.image.tower.model.patch_embed.proj.weight"} <= plain


def test_the_innermost_module_that_says_something_counts(model: MmctxModel) -> None:
    modules = {
        "encoders.image": ModuleConfig(lr_factor=0.1, weight_decay=0.5),
        "encoders.image.projector": ModuleConfig(lr_factor=2.0),
        "trunk.blocks.1": ModuleConfig(lr_factor=0.0),
    }
    config = AdamWConfig(weight_decay=0.2)
    optimizer = build_optimizer(model, config, modules)
    set_groups(optimizer, config, modules, 1.0)
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups_by_name(optimizer).items()}
    assert found["encoders.image.tower.model.blocks.0.mlp.fc1.weight"] == (0.1, 0.5)
    assert found["encoders.image.tower.model.blocks.0.mlp.fc1.bias"] == (0.1, 0.0)
    assert found["encoders.image.projector.1.weight"] == (2.0, 0.5)
    assert found["trunk.blocks.1.mlp.down.weight"] == (0.0, 0.2)
    assert found["trunk.blocks.0.mlp.down.weight"] == (1.0, 0.2)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_a_restart_under_other_groups_goes_on_bitwise(model: MmctxModel, config: OptimizerConfig) -> None:
    """The second sitting names more modules, and part of the model had no gradient yet."""
    whole, halved = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = build_optimizer(whole, config, ["encoders.audio"])
    train(whole, optimizer, config, range(1), skip="trunk")
    saved = {name: tensor.clone() for name, tensor in named_state(whole, optimizer).items()}
    assert not any(name.startswith("trunk") for name in stateful(whole, optimizer))
    halved.load_state_dict(whole.state_dict())
    train(whole, optimizer, config, range(1, 3))
    again = build_optimizer(halved, config, ["trunk.blocks.0", "encoders.audio.projector"])
    restore_state(halved, again, saved, Path("here"))
    train(halved, again, config, range(1, 3))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(halved)[name]), name


def stateful(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    return {name for name, p in model.named_parameters() if optimizer.state.get(p)}


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_the_foretold_state_is_what_a_step_makes(model: MmctxModel, config: OptimizerConfig) -> None:
    twin = copy.deepcopy(model)
    freeze(twin, {"encoders.audio": ModuleConfig(freeze=True)})
    optimizer = build_optimizer(twin, config)
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    tensors = [tuple(v.shape) for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert sorted(tensors) == sorted(state_shapes(twin, config))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_accelerate_takes_it(model: MmctxModel, config: OptimizerConfig) -> None:
    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    try:
        prepared, optimizer = accelerator.prepare(twin, build_optimizer(twin, config))
        set_gradients(prepared, 0)
        before = weights(twin)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in twin.parameters())
        assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(twin).items())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_adafactor_is_that_of_transformers() -> None:
    """Where the rate is below 1 / sqrt(steps), which PyTorch's never exceeds; the two guard tiny numbers differently."""
    config = AdafactorConfig(lr=0.05, weight_decay=0.1)
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = Adafactor(groups, lr=0.05, relative_step=False, scale_parameter=True, warmup_init=False)
    for seed in range(5):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        set_groups(optimizer, config, {}, 0.05)
        optimizer.step()
        reference.step()
    for name, tensor in weights(ours).items():
        if name == "bias":  # no decay: the updates alone
            torch.testing.assert_close(tensor, weights(theirs)[name], rtol=1e-5, atol=1e-6)
    # PyTorch's decay is lr x decay, Transformers' the tensor's own rate x decay: apart from it they agree
    assert (ours.weight - theirs.weight).abs().max() < 5 * 0.05 * 0.1 * theirs.weight.abs().max() * 1.5


def test_muon_makes_the_momentum_orthogonal_and_as_large_as_adamw_would() -> None:
    """Against singular vectors in float64. Newton-Schulz brings singular values near 1 alone (Jordan says 0.7 to 1.2)."""
    model = nn.ModuleDict({"trunk": nn.ModuleDict({"a": nn.Linear(48, 32, bias=False)})})
    config = MuonConfig(lr=0.5, weight_decay=0.1, momentum=0.9, nesterov=False)
    before = model["trunk"]["a"].weight.detach().double()  # type: ignore[index]
    optimizer = build_optimizer(model, config)
    momentum = torch.zeros(32, 48, dtype=torch.float64)
    for seed in range(3):
        set_gradients(model, seed)
        gradient = next(model.parameters()).grad
        assert gradient is not None
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        before = next(model.parameters()).detach().double().clone()
        set_groups(optimizer, config, {}, config.lr)
        optimizer.step()
    update = (before * (1 - 0.5 * 0.1) - next(model.parameters()).detach().double()) / 0.5
    u, _, v = torch.linalg.svd(momentum, full_matrices=False)
    singular = torch.diagonal(u.T @ (update / (0.2 * 48**0.5)) @ v.T)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    rotated = u.T @ update @ v.T
    assert (rotated - torch.diag(torch.diagonal(rotated))).abs().max() < 0.05


def test_a_torch_without_muon_is_an_error_that_says_so(monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"train\.optimizer\.kind=muon: torch .* has no Muon; install torch >="):
        build_optimizer(nn.Linear(2, 2), MuonConfig())


def test_adamw_is_fused(model: MmctxModel) -> None:
    assert build_optimizer(model, AdamWConfig()).defaults["fused"]
