"""Bugs that multimodal trainers have shipped, each put into a real model, backend, batch or objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctx.attention import Backend
from mmctx.attention.sdpa import sdpa_attention
from mmctx.encoders.audio import AudioBlock
from mmctx.layout import DocumentLayout
from mmctx.model import MmctxModel
from mmctx.objectives import LossSum
from mmctx.objectives.contrastive import SimilarityLoss
from mmctx.objectives.linear_cross_entropy import linear_cross_entropy
from mmctx.objectives.output_head import OutputHead
from mmctx.objectives.token_loss import TokenLoss
from mmctx.pack import IGNORE_INDEX, PackedBatch


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """One attention over all tokens: (T, H, d) each -> (T, H, d)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def padding_only(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """There is no padding, so a padding mask lets everything through."""
    return dense(q, k, v, None)


def no_mask(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """Causal over the whole sequence, in the belief that restarting positions keep documents apart."""
    return dense(q, k, v, None, causal=True)


def off_by_one(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """One boundary in the middle lies a token late, where that leaves nothing empty."""
    lengths = list(layout.lengths)
    number = next(n for n in range(len(lengths) // 2, len(lengths) - 1) if lengths[n + 1] > 1)
    lengths[number] += 1
    lengths[number + 1] -= 1
    return sdpa_attention(
        q, k, v, DocumentLayout.from_lengths(lengths, layout.num_causal, layout.cu_seqlens.device), window
    )


def window_over_border(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """A sliding window over the flat sequence, which forgets the documents."""
    if window is None:
        return sdpa_attention(q, k, v, layout, window)
    place = torch.arange(len(q))
    distance = place[:, None] - place[None, :]
    causal = (place < layout.num_causal_tokens)[:, None]
    return dense(q, k, v, (distance.abs() < window) & ((distance >= 0) | ~causal))


def two_documents_further(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """The third document sees the first."""
    out = sdpa_attention(q, k, v, layout, window)
    if not layout.num_causal:  # clips
        return out
    start = sum(layout.lengths[:2])
    return torch.cat([out[:start], out[start : start + layout.lengths[2]] + q[0], out[start + layout.lengths[2] :]])


def sees_the_future(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """Keeps documents apart, but takes all of them for bidirectional."""
    return sdpa_attention(q, k, v, DocumentLayout.from_lengths(layout.lengths, 0, layout.cu_seqlens.device), window)


def sees_nothing(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """No token looks at another one: nothing can leak, and nothing could be found."""
    return q * 0


def right_in_float32(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """Falls back to a kernel without a mask for half precision."""
    function = sdpa_attention if q.dtype == torch.float32 else no_mask
    return function(q, k, v, layout, window)


class _MixedUpBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int) -> Tensor:
        ctx.start = start
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        grad[ctx.start - 1] += grad[ctx.start]  # the last token of one document takes from the first of the next
        return grad, None


def wrong_backward(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
    """The forward pass is right, the backward pass adds one row to the neighbour's."""
    return sdpa_attention(_MixedUpBackward.apply(q, layout.lengths[0]), k, v, layout, window)  # type: ignore[arg-type]


def backend(function: Callable[..., Tensor]) -> Backend:
    """A backend that claims to run anywhere."""
    return Backend(function.__name__, function, lambda request: None, "planted")


class PoolsOverNeighbour(SimilarityLoss):
    """Mean of the last eight positions, whosesoever they are."""

    def embed(self, hidden: Tensor, positions: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        around = torch.stack([hidden[(positions - n).clamp(min=0)] for n in range(8)]).mean(0)
        return F.normalize(self.projection(around).float(), dim=-1)


class PoolsOffByOne(SimilarityLoss):
    """Takes the token after the last one."""

    def embed(self, hidden: Tensor, positions: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return super().embed(hidden, (positions + 1).clamp(max=len(hidden) - 1))


class LossOverNeighbour(SimilarityLoss):
    """Its embeddings are right, its loss mixes the batch's mean into each."""

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        return super().forward(hidden + hidden.mean(dim=0), batch, head)


class ShiftsOverBorder(TokenLoss):
    """Shifts the ids of the whole sequence, so that the last token of each document predicts the first of the next."""

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        positions = batch.label_positions.get(self.name)
        if positions is None:
            return super().forward(hidden, batch, head)
        ends = batch.layout.cu_seqlens[1:-1].long() - 1
        ends = ends[(ends[:, None] - positions[None, :]).abs().amin(dim=1) <= 1]  # of the documents that are asked
        positions = torch.cat([positions, ends])
        labels = batch.input_ids.roll(-1)[positions]
        total = linear_cross_entropy(hidden[positions], head.weight, labels)
        return LossSum(total, len(positions))


class ShiftsLabelsAgain(TokenLoss):
    """Labels are those of the next token already; shifted twice more, the last of a document is the first of the next."""

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        return super().forward(hidden, replace(batch, labels=batch.labels.roll(-2).clamp(min=0)), head)


class IgnoresLabels(TokenLoss):
    """Depends on nothing that it should."""

    def forward(self, hidden: Tensor, batch: PackedBatch, head: OutputHead) -> LossSum:
        return super().forward(hidden, replace(batch, labels=batch.labels * 0), head)


def swap_objective(model: MmctxModel, name: str, cls: type[nn.Module]) -> None:
    """The objective's own module, of another class: weights stay."""
    model.objectives[name].__class__ = cls


class AcrossClips(AudioBlock):
    """Attends over all clips as if they were one."""

    def forward(self, x: Tensor, layout: DocumentLayout, backend: str) -> Tensor:
        return super().forward(x, DocumentLayout.from_lengths([len(x)], 0), backend)


def attend_across_clips(model: MmctxModel) -> None:
    """In the last block of the audio encoder."""
    encoder: Any = model.encoders["audio"]
    encoder.blocks[-1].__class__ = AcrossClips


def normalise_over_batch(model: MmctxModel) -> None:
    """Batch norm behind the image encoder: its statistics mix all pictures."""
    encoder: Any = model.encoders["image"]
    encoder.projector.append(nn.BatchNorm1d(model.embedding.embedding_dim))


def ignore_pictures(model: MmctxModel) -> None:
    """A projector that starts at zero: nothing of a picture comes through."""
    encoder: Any = model.encoders["image"]
    nn.init.zeros_(encoder.projector[-1].weight)


class ScattersToNeighbour(MmctxModel):
    """Puts each picture into the slots of the next one."""

    def embed(self, batch: PackedBatch) -> Tensor:
        return super().embed(with_rows_of_neighbour(batch))


def with_rows_of_neighbour(batch: PackedBatch) -> PackedBatch:
    """Slots filled by the item before."""
    media = batch.media["image"]
    moved = replace(media, rows=media.rows.roll(media.num_tokens[0]))
    return replace(batch, media={**batch.media, "image": moved})


def with_label_over_border(batch: PackedBatch) -> PackedBatch:
    """The first document's last token is to predict the second one's first."""
    end = batch.layout.lengths[0] - 1
    labels = batch.labels.clone()
    assert labels[end] == IGNORE_INDEX
    labels[end] = batch.input_ids[end + 1]
    return replace(batch, labels=labels)


def with_late_boundary(batch: PackedBatch) -> PackedBatch:
    """The layout gives the second document's first token to the first."""
    first, second, *rest = batch.layout.lengths
    return replace(batch, layout=DocumentLayout.from_lengths([first + 1, second - 1, *rest], batch.layout.num_causal))


def with_running_positions(batch: PackedBatch) -> PackedBatch:
    """Positions that do not restart."""
    return replace(batch, position_ids=torch.arange(batch.num_tokens))


def with_late_pooling(batch: PackedBatch) -> PackedBatch:
    """One embedding is read one token too late."""
    name = next(iter(batch.pooled))
    pooled = batch.pooled[name].clone()
    pooled[0] += 1
    return replace(batch, pooled={**batch.pooled, name: pooled})
