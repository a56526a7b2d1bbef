"""Greedy decoding with a key/value cache, for evaluation: many prompts at once, packed, no padding in the prefill.

Everybody else generates through Transformers (`mmctx.hf`). Suites score many answers behind one prompt besides, from the same cache (see
`Branches`), and do so inside training; Transformers' loop takes 1.15 times as long on the demo's captions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmctx.kv_cache import KVCache
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch


@torch.no_grad()
def generate(model: MmctxModel, prompts: PackedBatch, eos_id: int, max_new_tokens: int = 32) -> list[list[int]]:
    """Continues every document of `prompts` with the likeliest tokens.

    Args:
        model: in evaluation mode.
        prompts: causal documents only, one a prompt.
        eos_id: a sequence ends here; the id itself is not returned.
        max_new_tokens: length at most.

    Returns:
        New token ids of each prompt, in the order of the batch.
    """
    hidden, cache = read_prompts(model, prompts, max_new_tokens)
    return continue_greedily(model, hidden, cache, eos_id, max_new_tokens)


@torch.no_grad()
def read_prompts(model: MmctxModel, prompts: PackedBatch, max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """The last hidden state of each prompt (B, D), and a cache with room for `max_new_tokens` more.

    Raises:
        ValueError: the batch holds bidirectional documents.
    """
    if prompts.layout.num_causal != len(prompts.layout.lengths):
        raise ValueError("generation continues causal documents; the batch holds bidirectional ones")
    cache = KVCache(max_new_tokens)
    return model.prefill(prompts, cache), cache


@torch.no_grad()
def continue_greedily(
    model: MmctxModel, hidden: Tensor, cache: KVCache, eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """The likeliest tokens after prompts that `read_prompts` read; see `generate`."""
    tokens, finished = [], torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for place in range(max_new_tokens):
        if place:
            hidden = model.step(tokens[-1], cache)
        token = model.next_token_logits(hidden).argmax(dim=-1)  # (B,)
        finished |= token == eos_id
        tokens.append(torch.where(finished, eos_id, token))
        if bool(finished.all()):
            break
    rows = torch.stack(tokens, dim=1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
