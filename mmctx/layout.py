"""How one flat sequence of tokens is cut into documents.

Shapes: T tokens, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmctx.parallel.exchange import TokenShards


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLayout:
    """The boundaries of the packed documents, known on the host and on the device.

    Causal documents come first, bidirectional ones after them, so attention is at most two variable-length calls on contiguous slices.
    Lengths are kept as host integers besides: nothing downstream asks the device where a document ends.

    Attributes:
        cu_seqlens: (N+1,) int32, cumulative lengths starting at 0.
        lengths: the N document lengths on the host, each at least 1.
        num_causal: the first `num_causal` documents attend causally, the rest in both directions.
        shards: with sequence parallel, how the tokens lie on several ranks; None where all of them are here.
        cache: scratch of the attention backends for things derived from the lengths (bucket indices), shared by all layers of one step.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_causal: int
    shards: TokenShards | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], num_causal: int, device: torch.device | str = "cpu"
    ) -> DocumentLayout:
        """Builds the layout of documents of `lengths` tokens, of which the first `num_causal` are causal."""
        lengths = tuple(int(n) for n in lengths)
        if any(n < 1 for n in lengths):
            raise ValueError(
                f"document lengths must be at least 1, found {min(lengths)} at index {lengths.index(min(lengths))}"
            )
        if not 0 <= num_causal <= len(lengths):
            raise ValueError(f"num_causal={num_causal} is outside 0..{len(lengths)}, the number of documents")
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
        return cls(cu_seqlens=cu_seqlens, lengths=lengths, num_causal=num_causal)

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document."""
        return max(self.lengths, default=0)

    @property
    def num_tokens(self) -> int:
        """T, the sum of all lengths."""
        return sum(self.lengths)

    @property
    def num_causal_tokens(self) -> int:
        """Tokens of the causal documents: they fill positions `[0, num_causal_tokens)`."""
        return sum(self.lengths[: self.num_causal])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DocumentLayout:
        """The same layout on another device."""
        return self.with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> DocumentLayout:
        """The same layout with its tensors moved or pinned by `change`; caches do not come along."""
        return replace(self, cu_seqlens=change(self.cu_seqlens), cache={})
