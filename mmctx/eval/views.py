"""Embeddings of held-out views, and which views show the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import documents_of, grouped, num_tokens
from mmctx.model import MmctxModel
from mmctx.pack import Document, pack_documents
from mmctx.sample import Sample


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """All held-out samples as one view shows them.

    Attributes:
        embeddings: (n, E) float32 unit vectors, on the host.
        samples: (n,) int64, the sample that each belongs to.
        contents: (n,) int64, equal for views of equal content: the same pixels, frames or tokens.
    """

    embeddings: Tensor
    samples: np.ndarray
    contents: np.ndarray

    def take(self, rows: np.ndarray) -> View:
        """Some of them, in the order of `rows`."""
        return View(self.embeddings[torch.from_numpy(rows)], self.samples[rows], self.contents[rows])


def embed_views(
    context: EvalContext,
    objective: str,
    suite: str = "retrieval",
    read: RunData | None = None,
    kind: str | None = None,
) -> dict[str, View]:
    """The views of every held-out sample, as a `similarity` objective embeds them.

    Args:
        context: model and held-out sources.
        objective: of the kind `similarity`.
        suite: whose progress is told.
        read: the same samples in another state, such as with noise; None for those of the context.
        kind: only views of this kind, `image`, `audio` or `text`; None for all.
    """
    data, bins = context.bins(objective)
    source = data if read is None else read.only(objective)

    def embed(bin: Bin) -> list[tuple[str, np.ndarray, list[int], list[int]]]:
        documents = [found.document for found in documents_of(source.dataset, bin)]
        documents = [d for d in documents if kind is None or (d.view or "").startswith(kind)]
        return embed_documents(context, objective, documents) if documents else []

    parts: dict[str, list[tuple[np.ndarray, list[int], list[int]]]] = {}
    for view, *part in each(context.map(suite, bins, embed)):
        parts.setdefault(view, []).append(part)  # type: ignore[arg-type]
    return {
        view: View(
            torch.from_numpy(np.concatenate([vectors for vectors, _, _ in found])),
            np.array([sample for _, samples, _ in found for sample in samples]),
            np.array([content for _, _, contents in found for content in contents]),
        )
        for view, found in parts.items()
    }


def embed_documents(
    context: EvalContext, objective: str, documents: list[Document]
) -> list[tuple[str, np.ndarray, list[int], list[int]]]:
    """(view, (n, E) float32, samples, contents) of each view in some documents of one `similarity` objective, in their order."""
    found = []
    for view, embedded, samples in embed_with(
        context.model, objective, documents, context.data.tokenizer.placeholder_ids, context.device
    ):
        contents = [content_of(document) for document in documents if document.view == view]
        found.append((view, embedded, samples, contents))
    return found


def embed_with(
    model: MmctxModel,
    objective: str,
    documents: list[Document],
    placeholder_ids: Mapping[str, int],
    device: torch.device,
) -> list[tuple[str, np.ndarray, list[int]]]:
    """(view, (n, E) float32, samples) of each view in some documents, by one `similarity` head of a model that lies on `device`."""
    head: Any = model.objectives[objective]
    batch = pack_documents(documents, placeholder_ids).to(device)
    hidden = model.encode(batch)
    found = []
    for name, positions in batch.pooled.items():
        embedded = head.embed(hidden, positions, batch.pool_sizes[name]).float().cpu().numpy()
        found.append((name.removeprefix(f"{objective}/"), embedded, list(batch.pairs[name])))
    return found


def content_of(document: Document) -> int:
    """A 63-bit number of what a document shows: its tokens, pixels and frames."""
    digest = hashlib.blake2b(document.input_ids.tobytes(), digest_size=8)
    for _, item in document.media:
        digest.update(item.values.contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def embed_texts(context: EvalContext, objective: str, texts: Sequence[str], suite: str) -> Tensor:
    """Unit embeddings (n, E) of any texts, as a `similarity` objective embeds its text views; what exceeds the context is cut off."""
    half: Any = context.data.dataset.objectives[objective]
    room = half.room(context.data.config.context_length)
    ids = [tokens[:room] for tokens in context.data.tokenizer.encode_many(texts)]
    documents = [half.view_document(Sample("", "", n), "text0", tokens) for n, tokens in enumerate(ids)]
    groups = grouped(documents, num_tokens(documents), context.data.config.bin_tokens)

    def embed(group: list[Document]) -> np.ndarray:
        ((_, vectors, *_),) = embed_documents(context, objective, group)
        return vectors

    return torch.from_numpy(np.concatenate(context.map(suite, groups, embed)))
