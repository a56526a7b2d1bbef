"""Which attention backends a run uses: settled once at its start, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmctx.attention import Request
from mmctx.attention.choice import using
from mmctx.attention.resolve import Resolution, resolve
from mmctx.train.config import RunConfig


@contextmanager
def settled_attention(config: RunConfig, accelerator: Accelerator) -> Iterator[Resolution]:
    """Inside, "auto" means the same on all ranks, whatever certificates their hosts hold. All ranks enter it together.

    Raises:
        ConfigError: `model.transformer.attention` cannot serve this run on every rank.
    """
    resolution = resolve(
        config.model.transformer.attention,
        layer_requests(config, accelerator.device),
        gather=lambda own: gather_object([own]),
        is_first=accelerator.is_main_process,
    )
    with using(resolution.choice):
        yield resolution


def layer_requests(config: RunConfig, device: torch.device) -> dict[str, Request]:
    """What the trunk's layers ask of a backend over all stages of a run: "global" ones, "local" ones under a window."""
    trunks = [stage.config.model.transformer for stage in config.stages]
    windowed = {trunk.layer_window(layer) is not None for trunk in trunks for layer in range(trunk.depth)}
    return {
        kind: Request(
            device=device,
            dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.precision],
            head_dim=config.model.transformer.head_width,
            windowed=is_local,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        for kind, is_local in (("global", False), ("local", True))
        if is_local in windowed
    }
