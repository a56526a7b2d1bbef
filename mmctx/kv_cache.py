"""Keys and values kept between generation steps.

Shapes: B sequences, T tokens of this call, H query heads, K key/value heads, d head width, M slots of a cache row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.attention import attention
from mmctx.layout import DocumentLayout


class KVCache:
    """Per layer (B, K, M, d) keys and values, one row a sequence, filled from the left.

    The first call (prefill) takes B packed documents of any lengths; every later call takes one token a sequence.

    Args:
        max_new_tokens: tokens that will be generated at most, so that rows can be allocated once.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths: Tensor | None = None  # (B,) tokens held, the current call's included

    def advance(self, layout: DocumentLayout) -> Tensor:
        """Makes room for this call's tokens and returns their positions (T,). Call once before the layers run."""
        new = torch.tensor(layout.lengths, device=layout.cu_seqlens.device)
        if self.lengths is None:
            self.lengths = new
            return torch.cat([torch.arange(n, device=new.device) for n in layout.lengths])
        if any(n != 1 for n in layout.lengths):
            raise ValueError(f"after the prefill each sequence takes one token a call, found lengths {layout.lengths}")
        self.lengths = self.lengths + 1
        return self.lengths - 1

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, *, window: int | None, backend: str
    ) -> Tensor:
        """Stores k and v (T, K, d) and attends q (T, H, d) to all that its sequence holds: (T, H, d)."""
        assert self.lengths is not None, "advance() comes before the layers"
        if layer not in self.keys:
            self._prefill(layer, k, v, layout)
            return attention(q, k, v, layout, window=window, backend=backend)
        keys, values = self.keys[layer], self.values[layer]
        row = torch.arange(len(q), device=q.device)
        keys[row, :, self.lengths - 1] = k
        values[row, :, self.lengths - 1] = v
        slot = torch.arange(keys.shape[2], device=q.device)
        seen = slot < self.lengths[:, None]  # (B, M)
        if window is not None:
            seen &= slot >= self.lengths[:, None] - window
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=seen[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )  # (B, H, 1, d)
        return out[:, :, 0]

    def _prefill(self, layer: int, k: Tensor, v: Tensor, layout: DocumentLayout) -> None:
        shape = (len(layout.lengths), k.shape[1], layout.max_seqlen + self.max_new_tokens, k.shape[2])
        self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for row, (kd, vd) in enumerate(zip(k.split(layout.lengths), v.split(layout.lengths), strict=True)):
            self.keys[layer][row, :, : len(kd)] = kd.transpose(0, 1)
            self.values[layer][row, :, : len(vd)] = vd.transpose(0, 1)
