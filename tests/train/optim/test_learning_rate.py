"""The learning rate: against the schedules of Transformers, and in tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.train.config import RunConfig
from mmctx.train.optim.learning_rate import ScheduleConfig, learning_rate

STEPS = 50


def theirs(make: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, **options)
    rates = []
    for _ in range(STEPS):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            {"kind": "cosine"},
            lambda: theirs(get_cosine_schedule_with_warmup, num_warmup_steps=10, num_training_steps=STEPS),
        ),
        (
            {"kind": "linear"},
            lambda: theirs(get_linear_schedule_with_warmup, num_warmup_steps=10, num_training_steps=STEPS),
        ),
        *(
            (
                {"kind": "wsd", "decay_steps": 15, "decay": decay, "final_ratio": ratio},
                lambda name=name, ratio=ratio: theirs(
                    get_wsd_schedule,
                    num_warmup_steps=10,
                    num_stable_steps=25,
                    num_decay_steps=15,
                    decay_type=name,
                    min_lr_ratio=ratio,
                ),
            )
            for decay, name, ratio in [("linear", "linear", 0.0), ("cosine", "cosine", 0.1), ("sqrt", "1-sqrt", 0.2)]
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_shapes_are_those_of_transformers(config: dict[str, Any], reference: Any) -> None:
    """But for the warm-up, which we begin one step later: its first step is not lost to a rate of zero."""
    schedule = ScheduleConfig.model_validate({"warmup_steps": 10, "final_ratio": 0.0} | config)
    ours = [learning_rate(step, STEPS, 2.0, schedule) for step in range(STEPS)]
    expected = reference()
    if schedule.final_ratio == 0:  # theirs begin the warm-up at the final ratio
        assert ours[:9] == pytest.approx(expected[1:10])
    assert ours[10:] == pytest.approx(expected[10:])


def test_constant_stays() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=2)
    assert [learning_rate(step, 9, 1.0, schedule) for step in (0, 1, 2, 8)] == [0.5, 1.0, 1.0, 1.0]


def test_a_decay_longer_than_the_run_begins_after_the_warm_up() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=4, decay_steps=100, decay="linear", final_ratio=0.0)
    assert [learning_rate(step, 8, 1.0, schedule) for step in (3, 4, 6)] == [1.0, 1.0, 0.5]


def test_lengths_in_tokens_count_the_full_batches_of_their_stages(tree: dict[str, Any]) -> None:
    del tree["train"]["steps"]
    tree["schedule"] = [{"steps": 3}, {"steps": 4, "bins_per_step": 4}]  # 1,200 and 2,400 tokens a step
    config = build_config(RunConfig, tree, "tree")

    def resolved(**options: Any) -> ScheduleConfig:
        return ScheduleConfig.model_validate(options).in_steps(config.stages)

    assert resolved(warmup_tokens=2401).warmup_steps == 3
    assert resolved(warmup_tokens=3600).warmup_steps == 3
    assert resolved(warmup_tokens=3601).warmup_steps == 4
    assert resolved(warmup_tokens=3 * 1200 + 4 * 2400 + 1).warmup_steps == 8  # longer than the run
    assert resolved(kind="wsd", decay_tokens=2401).decay_steps == 2
    assert resolved(kind="wsd", decay_tokens=4 * 2400 + 1).decay_steps == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wsd"}, "wsd takes one of them"),
        ({"kind": "wsd", "decay_steps": 3, "decay_tokens": 4}, "wsd takes one of them"),
        ({"kind": "cosine", "decay_steps": 3}, "cosine takes neither, wsd does"),
    ],
)
def test_a_decay_belongs_to_wsd_and_has_one_length(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(ScheduleConfig, options, "schedule")
