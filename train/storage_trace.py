"""Which storages are alive while a program runs on the meta device: exact lifetimes without the memory.

PyTorch keeps and frees meta tensors as it does real ones, in the forward pass and in the backward. So a training step that runs there, in
seconds and on any machine, says when memory peaks, how high, and what for. What kernels allocate inside and free again is seen only for
those in `SCRATCH`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCRATCH: dict[Any, Callable[..., int]] = {
    # exponentials of all logits
    torch.ops.aten.logsumexp.default: lambda logits, *_: logits.nbytes,
    # one contiguous gradient, and for each thread two blocks of 256 queries x 512 keys in float32
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda gradient, *_: (
        gradient.nbytes + (torch.get_num_threads() << 20)
    ),
}
"""Bytes that kernels on CPU take while they run, as functions of their arguments: where they matter, as measured."""


class StorageTrace(TorchDispatchMode):
    """Counts the bytes of live meta storages, by part.

    Attributes:
        part: what storages that are made now are counted as.
        place: where the program stands, for `peak_at`.
        live: bytes alive, by part.
        peak: bytes alive at the worst moment.
        at_peak: `live` of that moment.
        peak_at: `place` of that moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.place = "", ""
        self.live: Counter[str] = Counter()
        self.peak, self.at_peak, self.peak_at = 0, {}, ""
        self._known: dict[int, tuple[int, str]] = {}  # address of a live storage: its bytes and part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """The operation as it is; storages of its results are noted."""
        out = func(*args, **(kwargs or {}))
        if func in SCRATCH and args[0].is_meta:
            self._look(SCRATCH[func](*args))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self.count(leaf)
        return out

    def count(self, tensor: Tensor, part: str | None = None) -> None:
        """Counts a tensor's storage from now on until it dies; one that is known moves to `part`, if that is given."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None:
            weakref.finalize(storage, self._forget, storage._cdata)
        elif part is None or known[1] == part:
            return
        else:
            self.live[known[1]] -= known[0]
        size, part = storage.nbytes(), self.part if part is None else part
        self._known[storage._cdata] = (size, part)
        self.live[part] += size
        self._look()

    def _look(self, scratch: int = 0) -> None:
        """Whether this moment is the worst so far."""
        if (now := self.live.total() + scratch) > self.peak:
            self.at_peak = dict(self.live)
            self.at_peak[self.part] = self.at_peak.get(self.part, 0) + scratch
            self.peak, self.peak_at = now, self.place

    def _forget(self, address: int) -> None:
        size, part = self._known.pop(address)
        self.live[part] -= size


class FusedAttention(TorchFunctionMode):
    """Lets attention keep and make what fused kernels do: PyTorch falls back to the unfused one on the meta device, which would hold the
    probabilities of all pairs of tokens, hundreds of times as much for a long document.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Attention is replaced, all else is called as it is."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:  # PyTorch adds masks to scores, so it makes a float of a bool
            mask = torch.empty_like(mask, dtype=q.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, kwargs.get("is_causal", False), attn_mask=mask)[0]
