"""The modules that are exported: tensors in, tensors out, with nothing packed and nothing known on the host but sizes.

Shapes: B items, S side of a square picture, F frames of a clip, M mel bins, N embeddings of an item, L tokens of a text, D trunk width,
E width of a similarity embedding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmctx.attention.memory import Far
from mmctx.errors import ConfigError
from mmctx.layout import DocumentLayout
from mmctx.model import MmctxModel
from mmctx.pack import MediaBatch
from mmctx.rope import grid_positions


class PictureEncoder(nn.Module):
    """Pictures (B, 3, H, W) uint8 of one size -> embeddings (B, N, D)."""

    def __init__(self, model: MmctxModel) -> None:
        super().__init__()
        self.encoder: Any = model.encoders["image"]

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.encoder._encode(pixels)
        return rows.view(pixels.shape[0], -1, rows.shape[-1])


class SoundEncoder(nn.Module):
    """One clip of a fixed length: frames (F, M) -> embeddings (N, D)."""

    def __init__(self, model: MmctxModel, num_tokens: int) -> None:
        super().__init__()
        self.encoder: Any = copy.deepcopy(model.encoders["audio"])
        self.num_tokens = num_tokens
        for block in self.encoder.blocks:
            block.attend = _chunk_by_chunk

    def forward(self, frames: Tensor) -> Tensor:
        nowhere = torch.zeros(0, dtype=torch.int64)
        clip = MediaBatch(
            values=frames, lengths=(int(frames.shape[0]),), num_tokens=(self.num_tokens,), slots=nowhere, rows=nowhere
        )
        return self.encoder(clip)


class Embedding(nn.Module):
    """Documents of one length each -> unit embeddings (B, E), as a similarity objective makes them.

    Args:
        model: in evaluation mode.
        objective: name of the objective.
        embed_id: token that a view ends with where `pooling` is `token`.
        media: what makes embeddings of the input; None takes the ids of texts (B, L).
        columns: of a picture's grid, for models whose positions know it.
    """

    def __init__(
        self,
        model: MmctxModel,
        objective: str,
        embed_id: int,
        media: PictureEncoder | SoundEncoder | None = None,
        columns: int | None = None,
    ) -> None:
        super().__init__()
        half: Any = model.objectives[objective]
        self.media, self.trunk, self.tokens, self.projection = media, model.trunk, model.embedding, half.projection
        self.mean, self.causal = half.config.pooling == "mean", half.config.causal
        self.columns = columns if model.config.transformer.picture_positions == "grid" else None
        self.register_buffer("ending", torch.tensor([embed_id][: not self.mean], dtype=torch.int64), persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        x = self.tokens(given) if self.media is None else self.media(given)
        x = x if x.ndim == 3 else x[None]  # a clip comes alone
        ending = self.tokens(self.ending).to(x.dtype)  # (0 or 1, D)
        x = torch.cat([x, ending.expand(x.shape[0], -1, -1)], dim=1)  # (B, L, D)
        batch, length = x.shape[:2]
        positions = torch.arange(length, device=x.device)
        if self.media is not None and self.columns is not None:
            shown = positions[: length - ending.shape[-2]]
            positions = grid_positions(positions, shown, shown, self.columns)
        positions = positions.repeat(batch, *[1] * (positions.ndim - 1))
        nothing = DocumentLayout(cu_seqlens=positions.new_zeros(1), lengths=(), num_causal=0)
        hidden = self.trunk(x.flatten(0, 1), positions, nothing, _Alike(length, self.causal))  # type: ignore[arg-type]
        hidden = hidden.view(batch, length, -1)
        pooled = hidden.mean(dim=1) if self.mean else hidden[:, -1]
        return F.normalize(self.projection(pooled), dim=-1)


def _chunk_by_chunk(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, backend: str) -> Tensor:
    """Bidirectional attention (R, H, d) inside each chunk, in the place of a packed backend: plain enough for any graph."""
    parts = zip(*(x.transpose(0, 1).split(layout.lengths, dim=1) for x in (q, k, v)), strict=True)  # (H, L, d) each
    return torch.cat([F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts], dim=1).transpose(
        0, 1
    )


class _Alike:
    """Attention among documents of one length, in the place of a cache: plain enough for any graph."""

    def __init__(self, length: int, causal: bool) -> None:
        self.length, self.causal = length, causal

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: DocumentLayout,
        *,
        window: int | None,
        backend: str,
        far: Far | None = None,
    ) -> Tensor:
        """(B * L, H, d) queries, (B * L, K, d) keys and values -> (B * L, H, d)."""
        if far is not None:
            raise ConfigError("model.transformer.memory: graphs hold no memory; set model.transformer.memory=null")
        groups = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        q, k, v = (part.unflatten(0, (-1, self.length)).transpose(1, 2) for part in (q, k, v))  # (B, H, L, d)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).flatten(0, 1)
