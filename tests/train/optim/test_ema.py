"""Averaged weights: against PyTorch's own, over a restart, and on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmctx.errors import CheckpointError
from mmctx.train.optim.ema import Ema, EmaConfig, load_ema, read_ema, save_ema


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_it_is_the_average_of_pytorch() -> None:
    model = nn.Linear(5, 3)
    ours, theirs = (
        Ema(model, EmaConfig(decay=0.9, warmup=False)),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    )
    theirs.update_parameters(model)  # its first call copies
    for step in range(1, 20):
        move(model, step)
        ours.update(step)
        theirs.update_parameters(model)
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(ours.average[name], parameter.detach(), rtol=1e-6, atol=1e-6)


def test_warm_up_is_that_of_tensorflow_and_updates_come_every_few_steps() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, EmaConfig(decay=0.5, every=3))
    assert [ema.keep(step) for step in (3, 6, 9, 300)] == [0.1, 2 / 11, 3 / 12, 0.5]
    before = ema.average["weight"].clone()
    move(model, 0)
    ema.update(2)
    assert torch.equal(ema.average["weight"], before)
    ema.update(3)
    torch.testing.assert_close(ema.average["weight"], 0.1 * before + 0.9 * model.weight.detach())


def test_a_restart_goes_on_bitwise_and_the_file_loads_into_a_model(tmp_path: Path) -> None:
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    whole = Ema(model, EmaConfig())
    (tmp_path / "trainer").mkdir()
    for step in range(1, 5):
        move(model, step)
        whole.update(step)
    save_ema(whole.average, tmp_path / "trainer")
    twin.load_state_dict(model.state_dict())
    again = Ema(twin, EmaConfig())
    again.load(read_ema(tmp_path / "trainer"))
    for step in range(5, 9):
        for trained, ema in ((model, whole), (twin, again)):
            move(trained, step)
            ema.update(step)
    assert all(torch.equal(tensor, again.average[name]) for name, tensor in whole.average.items())
    save_ema(whole.average, tmp_path / "trainer")
    load_ema(model, tmp_path)
    assert torch.equal(model.weight, whole.average["weight"])


def test_a_checkpoint_without_an_average_says_how_to_have_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: .* kept where train\.ema is set"):
        load_ema(nn.Linear(2, 2), tmp_path)
