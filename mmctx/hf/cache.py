"""Transformers' key/value caches under the trunk: padded rows there, packed documents here.

Shapes: B rows, P columns in the cache, L columns of this call, T packed tokens of this call, H query heads, K key/value heads, d head
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from mmctx.attention import attention
from mmctx.attention.memory import Far
from mmctx.errors import ConfigError
from mmctx.hf.inputs import Rows
from mmctx.layout import DocumentLayout
from mmctx.tuning.prefix import Prefix

_SCORES = 1 << 22
"""Entries of a mask that exist at once: where many tokens follow a filled cache, queries take turns."""


def joined(cache: Cache | None, past: Cache | None) -> Cache | None:
    """The one of two caches that counts. peft hands a learned prefix over as `past_key_values`, at each step anew, beside the `cache` that
    `generate` keeps: an empty one takes the prefix over, a filled one has it."""
    if cache is None or past is None:
        return past if cache is None else cache
    if not cache.get_seq_length():
        for layer, held in enumerate(past.layers):
            cache.update(held.keys, held.values, layer)  # type: ignore[union-attr]
    return cache


class PaddedCache:
    """What a trunk's layers ask of a cache (see `mmctx.kv_cache`), on top of one of Transformers', which beams may reorder.

    Args:
        cache: filled in place, (B, K, P, d) keys and values a layer.
        rows: of this call.
        prefix: stands before every row, and is not in the cache: whoever reorders, crops or continues that need not know of it.
    """

    def __init__(self, cache: Cache, rows: Rows, prefix: Prefix | None = None) -> None:
        self._cache, self._rows, self._prefix = cache, rows, prefix
        self._seen: dict[tuple[int | None, int], Tensor | None] = {}  # masks, which layers share

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
        """Stores k and v (T, K, d), attends q (T, H, d) to all that its row holds: (T, H, d)."""
        if far is not None:
            raise ConfigError(
                "model.transformer.memory: Transformers' caches hold rotated keys alone; call the model with use_cache=False, or "
                "generate with mmctx.generate"
            )
        rows = self._rows
        keys, values = self._cache.update(rows.unpack(k).transpose(1, 2), rows.unpack(v).transpose(1, 2), layer)
        if not rows.past and self._prefix is not None:
            return self._prefix.before().attend(layer, q, k, v, layout, window=window, backend=backend)
        if not rows.past:
            return attention(q, k, v, layout, window=window, backend=backend)
        if self._prefix is not None:
            learned = self._prefix.layers[layer].weight.to(keys.dtype).permute(1, 2, 0, 3)  # (2, K, virtual tokens, d)
            keys, values = (
                torch.cat([part.expand(len(held), -1, -1, -1), held], dim=2)
                for part, held in zip(learned, (keys, values), strict=True)
            )
        queries = rows.unpack(q.to(keys.dtype)).transpose(1, 2)  # (B, H, L, d)
        size = max(1, _SCORES // (keys.shape[0] * keys.shape[2]))
        parts = [
            F.scaled_dot_product_attention(
                part,
                keys,
                values,
                attn_mask=self._mask(window, number * size, part.shape[2]),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for number, part in enumerate(queries.split(size, dim=2))
        ]
        return rows.pack(torch.cat(parts, dim=2).transpose(1, 2))

    def _mask(self, window: int | None, start: int, count: int) -> Tensor | None:
        """(B or 1, 1, count, virtual tokens + P + L) bool, what so many queries from column `start` of this call see; None for all."""
        if (window, start) not in self._seen:
            self._seen[window, start] = self._make_mask(window, start, count)
        return self._seen[window, start]

    def _make_mask(self, window: int | None, start: int, count: int) -> Tensor | None:
        rows, device = self._rows, self._rows.places.device
        before = 0 if self._prefix is None else self._prefix.num_tokens
        past, mask = before + rows.past, None if rows.mask is None else F.pad(rows.mask, (before, 0), value=True)
        total = past + rows.shape[1]
        if mask is None and total == past + 1 and (window is None or window >= total):
            return None
        query = past + start + torch.arange(count, device=device)[:, None]  # (count, 1)
        key = torch.arange(total, device=device)
        seen = (key <= query)[None]  # (1, count, total)
        number = key[None] if mask is None else mask.long().cumsum(dim=1)  # real tokens up to each column
        if mask is not None:
            seen = seen & mask[:, None]
        if window is not None:
            seen = seen & (number[:, query[:, 0], None] - number[:, None] < window)
        return (seen | (key == query))[:, None]  # padding looks at itself: its result is dropped, and must not be NaN
