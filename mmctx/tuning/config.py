"""What is trained of a model that has been trained before: all of it, or a little that is added to it.

    train:
      init: runs/base
      tune: {kind: lora, rank: 8}
      modules: {encoders.image.projector: {freeze: false}}

Of every kind but `full` the weights of the base stay as they are. What the objectives own is trained, too, and modules that `train.modules`
names with `freeze: false`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mmctx.config import StrictModel


class FullTuning(StrictModel):
    """All weights."""

    kind: Literal["full"] = "full"


class _OnLayers(StrictModel):
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Linear layers, by any part of their paths, such as `attention.qkv`, or `encoders.image` for all below it; null for those of the
    trunk."""


class LoraTuning(_OnLayers):
    """LoRA (Hu et al. 2022): beside a frozen matrix W a product B A of low rank, `(W + alpha / rank B A) x`."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    """Rows of A."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of what is added."""
    rank_stabilized: bool = False
    """`alpha / sqrt(rank)` in place of `alpha / rank` (Kalajdzievski 2023)."""


class AdaLoraTuning(_OnLayers):
    """AdaLoRA (Zhang et al. 2023): P E Q of low rank, whose least important entries of the diagonal E are taken away while training, so
    that the layers that need it keep more rank. The budget follows the run's steps.
    """

    kind: Literal["adalora"] = "adalora"
    initial_rank: int = Field(default=12, ge=1)
    """Rank of every layer at first."""
    rank: int = Field(default=8, ge=1)
    """Mean rank of the layers in the end."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of what is added."""
    start: int = Field(default=0, ge=0)
    """Steps before the first entry goes."""
    settle: int = Field(default=0, ge=0)
    """Steps at the end of the run in which the layers keep the ranks that they have."""
    every: int = Field(default=1, ge=1)
    """Steps from one choice to the next."""
    beta: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the means that importance is judged by."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Factor of the penalty that keeps P and Q orthogonal. It is in the gradients, not in the loss that is shown."""

    @model_validator(mode="after")
    def _check(self) -> AdaLoraTuning:
        if self.rank > self.initial_rank:
            raise ValueError(f"rank {self.rank} in the end is more than initial_rank {self.initial_rank}")
        return self


class PrefixTuning(StrictModel):
    """Prefix tuning (Li and Liang 2021): every document sees a few learned keys and values before its first token, in each layer.

    As in Transformers, its own tokens count their positions on from there, and a layer's window holds the prefix as long as it reaches it.
    """

    kind: Literal["prefix"] = "prefix"
    num_tokens: int = Field(default=16, ge=1)
    """Virtual tokens."""


class AdapterTuning(StrictModel):
    """Bottleneck adapters: `y + up(gelu(down(y)))` on what attention and MLP add to the stream (Houlsby et al. 2019), or on the MLP's alone
    (Pfeiffer et al. 2021). Peft has none, so they are ours.
    """

    kind: Literal["adapter"] = "adapter"
    width: int = Field(default=64, ge=1)
    """Of the bottleneck."""
    places: Literal["both", "mlp"] = "both"
    """both: behind attention and MLP. mlp: behind the MLP."""


def _kind(value: Any) -> str:
    return str(value.get("kind", "full") if isinstance(value, dict) else getattr(value, "kind", value))


AnyTuning = Annotated[
    Annotated[FullTuning, Tag("full")]
    | Annotated[LoraTuning, Tag("lora")]
    | Annotated[AdaLoraTuning, Tag("adalora")]
    | Annotated[PrefixTuning, Tag("prefix")]
    | Annotated[AdapterTuning, Tag("adapter")],
    Discriminator(_kind),
]
"""One of them by `kind`, `full` where none is given."""
