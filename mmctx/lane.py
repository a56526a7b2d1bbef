"""What a stream's pieces leave for the next one: keys and values of layers that look back beyond a piece, without their graph.

Shapes: T tokens of a call, L of them the piece, P tokens kept, H query heads, K key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmctx.attention import attention
from mmctx.attention.memory import Far, Past, memory_attention
from mmctx.layout import DocumentLayout
from mmctx.transformer import TransformerConfig

_LENGTH = "length"


class Lane:
    """The memory of one stream, read piece by piece: a `mmctx.kv_cache.Cache` for a batch whose first document is the next piece.

    A layer with a window keeps what later tokens may still see: its window and, with a memory, `tokens` more; older ones are forgotten
    first. A layer without a window keeps nothing. `attend` may be called several times for a piece, as checkpointing and cached gradients
    do: nothing changes before `commit`.

    Attributes:
        length: tokens of the document that have been read.
        layers: what each layer keeps of the newest of them.
    """

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, Past] = {}
        self._next: dict[int, Past] = {}
        self._num_tokens = 0

    def open(self, start: int) -> None:
        """A piece begins after `start` tokens of its document. What is kept of any other place of any document is forgotten."""
        if start == 0 or start != self.length:
            self.layers = {}
        self.length, self._next, self._num_tokens = start, {}, 0

    def commit(self) -> None:
        """The piece has been read: the next one follows."""
        self.layers, self.length = self._next, self.length + self._num_tokens
        self._next, self._num_tokens = {}, 0

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
        """Attends q (T, H, d) to k, v (T, K, d), the first document also to what its earlier pieces left: (T, H, d)."""
        self._num_tokens = layout.lengths[0]
        if window is None:
            return attention(q, k, v, layout, backend=backend)
        past = self.layers.get(layer)
        out = memory_attention(q, k, v, layout, far, window=window, backend=backend, past=past)
        keep = window - 1 + (far.tokens if far is not None else 0)
        if keep:
            self._next[layer] = self._kept(past, (k, v, k if far is None else far.k), keep)
        return out

    def _kept(self, past: Past | None, new: tuple[Tensor, Tensor, Tensor], keep: int) -> Past:
        k, v, far_k = new
        kept_k, kept_v = (self._newest(old, x, keep) for old, x in ((past and past.k, k), (past and past.v, v)))
        same = far_k is k and (past is None or past.far_k is past.k)
        return Past(kept_k, kept_v, kept_k if same else self._newest(past and past.far_k, far_k, keep))

    @torch.no_grad()
    def _newest(self, old: Tensor | None, new: Tensor, keep: int) -> Tensor:
        """The newest `keep` rows of both, in memory of their own."""
        new = new[: self._num_tokens][-keep:]
        if not new.is_meta and torch.is_autocast_enabled(new.device.type) and new.dtype != torch.float64:
            new = new.to(torch.get_autocast_dtype(new.device.type))
        room = keep - len(new)
        if old is None or not room:
            return new.detach().clone(memory_format=torch.contiguous_format)
        return torch.cat([old[-room:].to(new.dtype), new])

    @classmethod
    def full(cls, trunk: TransformerConfig, start: int, device: torch.device | str, dtype: torch.dtype) -> Lane:
        """A lane that holds all that it may after `start` tokens, of no value: for estimates of memory."""
        lane = cls()
        lane.length = start
        for layer in range(trunk.depth):
            window = trunk.layer_window(layer)
            remembers = trunk.memory is not None and layer in trunk.memory.layers
            beyond = trunk.memory.tokens if trunk.memory is not None and remembers else 0
            if window is not None and (kept := min(window - 1 + beyond, start)):
                shape = kept, trunk.kv_heads, trunk.head_width
                k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
                apart = trunk.memory is not None and remembers and trunk.memory.distances == "clamped"
                lane.layers[layer] = Past(k, v, torch.empty_like(k) if apart else k)
        return lane

    def state(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint."""
        found = {_LENGTH: torch.tensor(self.length)}
        for layer, past in self.layers.items():
            found |= {f"{layer}.k": past.k, f"{layer}.v": past.v}
            if past.far_k is not past.k:
                found[f"{layer}.far_k"] = past.far_k
        return found

    @classmethod
    def restored(cls, state: Mapping[str, Tensor], device: torch.device | str) -> Lane:
        """What `state` gave."""
        lane = cls()
        lane.length = int(state[_LENGTH])
        tensors = {name: tensor.to(device) for name, tensor in state.items() if name != _LENGTH}
        for layer in {name.partition(".")[0] for name in tensors}:
            k, v = tensors[f"{layer}.k"], tensors[f"{layer}.v"]
            lane.layers[int(layer)] = Past(k, v, tensors.get(f"{layer}.far_k", k))
        return lane
