"""Regression: `sum (w . h + b - y)^2`, h the document's embedding, y the number of its json member in units of `scale` from `offset`.

Labels of a batch are integers, so y travels as a fixed-point number in steps of 2^-20 above -2^20.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from mmctx.errors import SampleError
from mmctx.objectives.labelled import Labelled, LabelledConfig, LabelledLoss
from mmctx.tokenizer import TextTokenizer

_STEPS, _ZERO = 1 << 20, 1 << 40


class RegressionConfig(LabelledConfig):
    """A number for each document."""

    kind: Literal["regression"] = "regression"
    offset: float = 0.0
    """Of the labels: their mean, so that the model starts near it."""
    scale: float = Field(default=1.0, gt=0)
    """Of the labels: their spread. The loss is in units of its square."""


def to_label(value: float) -> int:
    """The integer that stands for a number below 2^19 in size."""
    return round(value * _STEPS) + _ZERO


class Numbers:
    """Names of the labels of a `Regression`, in the units of the data."""

    def __init__(self, config: RegressionConfig) -> None:
        self._offset, self._scale = config.offset, config.scale

    def __len__(self) -> int:
        return 2 * _ZERO

    def __getitem__(self, label: int) -> str:
        return f"{(label - _ZERO) / _STEPS * self._scale + self._offset:.6g}"


class Regression(Labelled):
    """Data half."""

    config: RegressionConfig

    def __init__(self, name: str, config: RegressionConfig, tokenizer: TextTokenizer) -> None:
        super().__init__(name, config, tokenizer)
        self.answers = Numbers(config)

    def number(self, value: Any) -> int:
        """The label in fixed point."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SampleError("bad_json", f"expected a number, found {str(value)[:80]}")
        scaled = (value - self.config.offset) / self.config.scale
        if abs(scaled) >= 1 << 19:
            raise SampleError(
                "bad_json", f"{value} is {scaled:.3g} times scale={self.config.scale}; set it to their spread"
            )
        return to_label(scaled)


class RegressionLoss(LabelledLoss):
    """Model half: squared error."""

    def __init__(self, name: str, config: RegressionConfig, width: int) -> None:
        super().__init__(name, config, width, 1)
        self.offset, self.scale = config.offset, config.scale

    def values(self, labels: Tensor, dtype: Any) -> Tensor:
        """(K,) labels as numbers in units of `scale` from `offset`."""
        return ((labels - _ZERO).double() / _STEPS).to(dtype)

    def penalty(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Squared error."""
        return (scores[:, 0] - self.values(targets, scores.dtype)).square().sum()
