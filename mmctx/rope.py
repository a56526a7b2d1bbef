"""Rotary positions: how fast each pair of channels turns, the angles of a batch, and the rotation itself.

Shapes: T tokens, H heads, d head width, S media slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmctx.config import StrictModel


class RopeConfig(StrictModel):
    """Rotary position embedding (Su et al. 2021) and how it is stretched to a longer context."""

    base: float = Field(default=10_000.0, gt=1)
    """Wavelength base; larger bases turn more slowly."""
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """none; linear: positions divided by `factor` (Chen et al. 2023); ntk: base raised instead; yarn: by parts (Peng et al. 2023);
    llama3: by parts, as in Llama 3.1."""
    factor: float = Field(default=1.0, ge=1)
    """How many times longer the new context is than `original_context`."""
    original_context: int = Field(default=2048, ge=1)
    """Context the weights were trained at; only yarn and llama3 read it."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: dimensions that turn less often than this are fully interpolated."""
    truncate: bool = True
    """yarn: the limits between those are rounded outwards to whole dimensions."""
    attention_factor: float | None = Field(default=None, gt=0)
    """yarn: scale of cosines and sines; null means 0.1 ln(factor) + 1, as the paper advises, or what the next two say."""
    mscale: float | None = Field(default=None, gt=0)
    """yarn, as in DeepSeek: with `mscale_all_dim`, the scale is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: float | None = Field(default=None, gt=0)
    """See `mscale`."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """llama3: what turns less often than this within the original context is fully interpolated."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """llama3: what turns more often than this is left alone."""

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        limits = {"yarn": ("beta_slow", "beta_fast"), "llama3": ("low_freq_factor", "high_freq_factor")}
        if self.scaling in limits:
            slow, fast = limits[self.scaling]
            if getattr(self, slow) >= getattr(self, fast):
                raise ValueError(f"{slow} {getattr(self, slow)} must be less than {fast} {getattr(self, fast)}")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim only mean something together: set both or neither")
        return self


def rope_frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angular frequencies (d / 2,) in float64, and the factor that scales cosines and sines (not 1 only for yarn).

    Equal to `transformers.modeling_rope_utils` for the same parameters. NTK scaling is there in its dynamic form only, whose factor follows
    the length s of the text; ours is fixed, and equal to theirs at `factor = f * s / max_position_embeddings - (f - 1)`.
    """
    return _SCALINGS[config.scaling](config, head_dim), _attention_factor(config)


def _plain(base: float, head_dim: int) -> Tensor:
    return base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def _unscaled(config: RopeConfig, head_dim: int) -> Tensor:
    return _plain(config.base, head_dim)


def _linear(config: RopeConfig, head_dim: int) -> Tensor:
    return _plain(config.base, head_dim) / config.factor


def _ntk(config: RopeConfig, head_dim: int) -> Tensor:
    """The base for which the slowest dimension is slowed down by `factor`, and the fastest not at all (bloc97 2023)."""
    return _plain(config.base * config.factor ** (head_dim / (head_dim - 2)), head_dim)


def _yarn(config: RopeConfig, head_dim: int) -> Tensor:
    """Slow dimensions interpolated, fast ones not, and a ramp over the dimensions between."""

    def dimension(rotations: float) -> float:  # the one that makes this many turns within the original context
        return head_dim * math.log(config.original_context / (rotations * 2 * math.pi)) / (2 * math.log(config.base))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    plain, slow = _plain(config.base, head_dim), ramp.clamp(0, 1)
    return plain / config.factor * slow + plain * (1 - slow)


def _llama3(config: RopeConfig, head_dim: int) -> Tensor:
    """As yarn, with a ramp over the number of turns instead of the dimensions (Llama 3.1, Grattafiori et al. 2024)."""
    plain = _plain(config.base, head_dim)
    turns = config.original_context * plain / (2 * math.pi)
    fast = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    fast = fast.clamp(0, 1)
    return plain / config.factor * (1 - fast) + plain * fast


_SCALINGS: dict[str, Callable[[RopeConfig, int], Tensor]] = {
    "none": _unscaled,
    "linear": _linear,
    "ntk": _ntk,
    "yarn": _yarn,
    "llama3": _llama3,
}


def _attention_factor(config: RopeConfig) -> float:
    """What yarn multiplies cosines and sines by, so that attention over more keys stays as sharp."""
    if config.scaling != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    spread = 0.1 * math.log(config.factor)
    if config.mscale is not None and config.mscale_all_dim is not None:
        return (config.mscale * spread + 1) / (config.mscale_all_dim * spread + 1)
    return spread + 1


AXES = (0, 1, 0, 2)
"""Which axis turns a frequency, repeated over all of them: position in the sequence, row, sequence, column. As the sections of Qwen2-VL
(Wang et al. 2024), but interleaved, so that every axis has slow and fast ones."""


def grid_positions(position_ids: Tensor, slots: Tensor, place: Tensor, columns: Tensor | int) -> Tensor:
    """Positions (T, 3) on the axes sequence, row and column. Text stands at its position on all three, which is plain rotation.

    A picture's rows and columns count from where it starts in its document, so distances to the text around it stay of use.

    Args:
        position_ids: (T,).
        slots: (S,) places of whole pictures in the flat sequence.
        place: (S,) int64 number of each in its picture, row by row.
        columns: (S,) tokens of a row of the picture that each belongs to, or one number for all.
    """
    sequence = position_ids[slots]
    row, column = sequence - place + place // columns, sequence - place + place % columns
    return position_ids[:, None].repeat(1, 3).index_copy_(0, slots, torch.stack([sequence, row, column], dim=1))


class Rotary:
    """The angles of one `RopeConfig`. No module and no buffers: `model.bfloat16()` must not round the frequencies."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        with torch.device(
            "cpu"
        ):  # no weights: a model that is built without memory, on the meta device, must still have them
            self.frequencies, self.scale = rope_frequencies(config, head_dim)
            self.axes = torch.tensor([AXES[number % len(AXES)] for number in range(head_dim // 2)])
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, 1, d / 2) of positions (T,), or (T, 3) by `AXES`, in float32 at least."""
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        device = position_ids.device
        if device not in self._on_device:  # copied to a device once: copies wait for it
            self._on_device[device] = self.frequencies.to(device), self.axes.to(device)
        frequencies, axes = self._on_device[device]
        turned_by = (
            position_ids[:, None] if position_ids.ndim == 1 else position_ids.index_select(1, axes)
        )  # (T, d / 2)
        angles = (turned_by.to(precision) * frequencies.to(precision))[:, None]
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (T, H, d) by (T, 1, d / 2) angles, halves convention (Llama's)."""
    if (
        torch.compiler.is_compiling()
    ):  # a compiler fuses the plain formula, and does not take results written into views
        exact = x.to(cos.dtype)
        first, second = exact.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """Rotation of (T, H, d) by (T, 1, d / 2) angles in half the memory passes that autograd's own graph takes.

    A rotation's gradient is the rotation back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = x.to(cos.dtype)  # angles rounded to bf16 would blur positions in a long context
    out = torch.empty_like(exact, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = exact.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.to(x.dtype)
