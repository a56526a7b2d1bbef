"""The loss of every single prediction, where a suite asks for more than sums.

Shapes: K labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmctx.eval.context import EvalContext
from mmctx.eval.documents import grouped, num_tokens
from mmctx.pack import IGNORE_INDEX, Document, pack_documents

_ROWS = 1024
"""Rows of logits that exist at a time."""


def token_losses(context: EvalContext, documents: Sequence[Document]) -> list[Tensor]:
    """(K,) float64 loss of each labelled position of each document, in nats, on the host; the documents are packed as they come."""
    found: list[Tensor] = []
    for group in grouped(documents, num_tokens(documents), context.data.config.bin_tokens):
        batch = pack_documents(group, context.data.tokenizer.placeholder_ids).to(context.device)
        places = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]
        hidden, labels = context.model.encode(batch).index_select(0, places), batch.labels[places]
        parts = [
            F.cross_entropy(context.model.next_token_logits(states).float(), targets, reduction="none")
            for states, targets in zip(hidden.split(_ROWS), labels.split(_ROWS), strict=True)
        ]
        losses = torch.cat(parts).double().cpu()
        # packing puts causal documents first: with causal ones alone their order stays
        found += losses.split([int((document.labels != IGNORE_INDEX).sum()) for document in group])
    return found
