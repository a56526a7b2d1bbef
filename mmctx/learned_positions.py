"""Learned position embeddings: a vector for each place of a document, as in GPT-2 and BERT. They end where the weights end.

Shapes: T tokens, P positions, D width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmctx.errors import ConfigError
from mmctx.kv_cache import Branches, KVCache
from mmctx.layout import DocumentLayout

Resize = Literal["interpolate", "repeat"]
"""How positions become more. interpolate: stretched linearly over the longer context. repeat: laid end to end, so that neighbours stay as
they were (Longformer, Beltagy et al. 2020)."""


class LearnedPositions(nn.Embedding):
    """Positions (T,) -> (T, D)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        nn.init.normal_(self.weight, std=0.02)

    def check(self, layout: DocumentLayout, cache: KVCache | Branches | None) -> None:
        """Looks at lengths before the device does, which would only say that an index is out of range.

        Raises:
            ConfigError: a document is longer than there are positions, or may become so in generation.
        """
        new = cache.max_new_tokens if isinstance(cache, KVCache) and not cache.keys else 0
        length = layout.max_seqlen + (cache.prompt_length if isinstance(cache, Branches) else 0)
        if length + new > self.num_embeddings:
            raise ConfigError(
                f"a document of {length} tokens{f' and {new} new ones' if new else ''} needs more positions than "
                f"model.transformer.learned_positions={self.num_embeddings}; shorten it, or start a run with more positions "
                "(with model.transformer.resize_positions, if they come from a folder)"
            )


def resize_positions(weight: Tensor, count: int, how: Resize | None) -> Tensor:
    """Embeddings (P, D) of a folder for `count` positions: the first of them, or more, see `Resize`.

    Raises:
        ConfigError: more are wanted, and nobody said how.
    """
    if count <= len(weight):
        return weight[:count]
    if how is None:
        raise ConfigError(
            f"model.transformer.learned_positions={count}, but the pretrained weights have {len(weight)} positions; set "
            "model.transformer.resize_positions to interpolate or repeat, or ask for no more"
        )
    if how == "repeat":
        return weight.repeat(-(-count // len(weight)), 1)[:count]
    return F.interpolate(weight.T[None], size=count, mode="linear", align_corners=True)[0].T
