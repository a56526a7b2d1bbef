"""Our side of a comparison: a model with a folder's weights, and its logits on packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.config import build_config
from mmctx.model import MmctxModel, ModelConfig
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.objectives.masked_lm import MaskedLMConfig
from mmctx.pack import IGNORE_INDEX, Document, PackedBatch, pack_documents

OBJECTIVES = {"captioning": CaptioningConfig(), "masked_lm": MaskedLMConfig()}


def load(folder: Path, vocab_size: int, **options: Any) -> MmctxModel:
    """A model of the folder's shape with its weights."""
    from mmctx.pretrained.trunk import load_trunk

    config = build_config(ModelConfig, {"transformer": {"pretrained": str(folder), **options}}, "test")
    torch.manual_seed(1)
    model = MmctxModel(config, OBJECTIVES, vocab_size)
    load_trunk(model, folder)
    return model.eval()


def batch_of(documents: Sequence[Tensor], causal: bool) -> PackedBatch:
    """Texts, packed."""
    name = "captioning" if causal else "masked_lm"
    nothing = [np.full(len(ids), IGNORE_INDEX) for ids in documents]
    parts = [Document(name, ids.numpy(), labels, causal=causal) for ids, labels in zip(documents, nothing, strict=True)]
    return pack_documents(parts, {})


@torch.no_grad()
def logits(model: MmctxModel, documents: Sequence[Tensor], causal: bool) -> list[Tensor]:
    """(L, V) of each document, packed beside the others."""
    found = model.next_token_logits(model.encode(batch_of(documents, causal)))
    return list(found.split([len(ids) for ids in documents]))
