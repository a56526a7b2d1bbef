"""Which optimizer, and with what settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mmctx.config import StrictModel


class OptimizerConfig(StrictModel):
    """What every optimizer has."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled L2, on matrices only: not on norms, biases, embeddings and scales."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), fused."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    """Decays of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class AdafactorConfig(OptimizerConfig):
    """Adafactor (Shazeer and Stern 2018): row and column sums in place of a matrix's second moments, and no first ones."""

    kind: Literal["adafactor"] = "adafactor"
    lr: float = Field(default=1e-2, gt=0)
    """Peak learning rate, relative to each tensor's own size (its root mean square). Steps never exceed 1 / sqrt(steps taken)."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """The second moments' decay after t steps is 1 - t ** this."""
    min_scale: float = Field(default=1e-3, gt=0)
    """A tensor counts as at least so large."""
    clip_update: float = Field(default=1.0, gt=0)
    """Updates of a tensor are scaled down to this root mean square."""


class MuonConfig(AdamWConfig):
    """Muon (Jordan et al. 2024) for the linear layers of trunk and encoders; AdamW, by `betas` and `eps`, for all else.

    A linear layer's update is its momentum made orthogonal by five Newton-Schulz iterations in bfloat16.
    """

    kind: Literal["muon"] = "muon"  # type: ignore[assignment]
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead along it."""
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """match_rms_adamw: updates are as large as AdamW's, so that one `lr` serves both (Liu et al. 2025). original: Jordan's factor."""


def _kind(value: Any) -> str:
    return str(value.get("kind", "adamw") if isinstance(value, dict) else getattr(value, "kind", value))


AnyOptimizer = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdafactorConfig, Tag("adafactor")]
    | Annotated[MuonConfig, Tag("muon")],
    Discriminator(_kind),
]
"""One of them by `kind`, AdamW where none is given."""
