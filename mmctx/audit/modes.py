"""The ways in which a model is run, and putting it back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmctx.attention import BACKENDS, Request, select_backend
from mmctx.audit.report import Mode
from mmctx.model import MmctxModel
from mmctx.transformer import Attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types that attention sees under each precision."""


def own_mode(model: MmctxModel, precision: str, device: torch.device) -> Mode:
    """The mode that the model is configured for; "auto" becomes the backend that it would take, if that is one for all layers."""
    asked = [(module.backend, request) for module, request in _requests(model, precision, device)]
    names = {select_backend(name, request).name for name, request in asked}
    backend = names.pop() if len(names) == 1 else asked[0][0]
    return Mode(backend, precision, model.trunk.activations.checkpoint != "none", every_pair=True)


def other_modes(own: Mode, model: MmctxModel, device: torch.device) -> tuple[list[Mode], list[str]]:
    """Every other mode that can run here, and why the backends that cannot do not."""
    modes, notes = [], []
    for name, backend in BACKENDS.items():
        for precision in DTYPES:
            reasons = [reason for _, r in _requests(model, precision, device) if (reason := backend.why_not(r))]
            if reasons:
                notes.append(f"{name} {precision}: {reasons[0]}")
                continue
            modes += [Mode(name, precision, checkpointing) for checkpointing in (False, True)]
    same = (own.backend, own.precision, own.checkpointing)
    return [mode for mode in modes if (mode.backend, mode.precision, mode.checkpointing) != same], notes


def _requests(model: MmctxModel, precision: str, device: torch.device) -> list[tuple[Attention, Request]]:
    """Each layer's attention, and what it will ask of a backend."""
    layers = [module for module in model.trunk.modules() if isinstance(module, Attention)]
    return [(a, Request(device, DTYPES[precision], a.head_dim, a.window is not None)) for a in layers]


@contextmanager
def running(model: MmctxModel, mode: Mode, device: torch.device) -> Iterator[None]:
    """The model in a mode, in training mode, under its autocast."""
    trunk, before = model.trunk, model.trunk.activations
    kind = {True: "full" if before.checkpoint == "none" else before.checkpoint, False: "none"}[mode.checkpointing]
    offload = before.offload and mode.checkpointing
    attention = [module for module in trunk.modules() if isinstance(module, Attention)]
    backends = [module.backend for module in attention]
    hearing: list[Any] = [encoder for encoder in model.encoders.values() if hasattr(encoder, "attention_backend")]
    hearing_backends = [module.attention_backend for module in hearing]
    try:
        trunk.set_activations(before.model_copy(update={"checkpoint": kind, "offload": offload}))
        for module in attention:
            module.backend = mode.backend
        for encoder in hearing:  # its heads may be of a width that the backend cannot take
            width = encoder.config.width // encoder.config.num_heads
            request = Request(device, DTYPES[mode.precision], width)
            if mode.backend in BACKENDS and BACKENDS[mode.backend].why_not(request) is None:
                encoder.attention_backend = mode.backend
        with torch.autocast(device.type, torch.bfloat16, enabled=mode.precision == "bf16"):
            yield
    finally:
        trunk.set_activations(before)
        for module, name in zip(attention, backends, strict=True):
            module.backend = name
        for encoder, name in zip(hearing, hearing_backends, strict=True):
            encoder.attention_backend = name


@contextmanager
def left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode inside; afterwards generators, buffers (running statistics) and training flags are what they were before."""
    flags = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.train()
            yield
        finally:
            _restore(model, buffers)
            for module, training in flags.items():
                module.training = training


def _restore(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
