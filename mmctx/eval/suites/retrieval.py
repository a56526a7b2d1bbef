"""Suite `retrieval`: does the embedding of one view find its partner among all held-out samples?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.eval.context import EvalContext
from mmctx.objectives.contrastive import matching_rows
from mmctx.pack import PackedBatch

RANKS = (1, 5, 10)


def embed_views(
    context: EvalContext, objective: str, suite: str = "retrieval"
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Unit embeddings (P, E) of every held-out view, and the sample each belongs to."""
    head: Any = context.model.objectives[objective]

    def embed(batch: PackedBatch) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        hidden = context.model.encode(batch)
        return {
            name.removeprefix(f"{objective}/"): (
                head.embed(hidden, positions, batch.pool_sizes[name]).float().cpu(),
                batch.pairs[name],
            )
            for name, positions in batch.pooled.items()
        }

    vectors: dict[str, list[Tensor]] = {}
    samples: dict[str, list[int]] = {}
    for found in context.map_batches(suite, embed, objective):
        for view, (embedded, pairs) in found.items():
            vectors.setdefault(view, []).append(embedded)
            samples.setdefault(view, []).extend(pairs)
    return {view: torch.cat(parts) for view, parts in vectors.items()}, samples


def recall(scores: Tensor) -> dict[str, float]:
    """R@k of square scores (n, n), query i's partner being candidate i: the share of queries whose partner ranks among the first k.

    Ties count against the query: a model that gives every pair the same score recalls nothing.
    """
    better = (scores >= scores.diagonal()[:, None]).sum(dim=1)  # the partner itself counts as one
    result = {f"R@{k}": float((better <= k).double().mean()) for k in RANKS}
    return {**result, "MRR": float((1.0 / better.double()).mean()), "n": len(scores)}


def evaluate_retrieval(context: EvalContext) -> dict[str, Any]:
    """`{"image_to_text": {"R@1", "R@5", "R@10", "MRR", "n"}, ...}` in both directions of every configured pair of views.

    Only a sample's own partner counts: where two samples share one picture under different names, the numbers are a
    lower bound. The first text is called `text`, others `text1`, `text2`; a second similarity objective prefixes its name.
    """
    results: dict[str, Any] = {}
    for objective in (names := context.names("similarity")):
        embeddings, samples = embed_views(context, objective)
        prefix = "" if objective == names[0] else f"{objective}/"
        for a, b in context.objectives[objective].pairs:  # type: ignore[union-attr]
            if a not in embeddings or b not in embeddings:
                continue
            rows_a, rows_b = matching_rows(np.asarray(samples[a]), np.asarray(samples[b]))
            if not len(rows_a):
                continue
            scores = embeddings[a][rows_a] @ embeddings[b][rows_b].T
            results[f"{prefix}{_label(a)}_to_{_label(b)}"] = recall(scores)
            results[f"{prefix}{_label(b)}_to_{_label(a)}"] = recall(scores.T)
    return results


def _label(view: str) -> str:
    return "text" if view == "text0" else view
