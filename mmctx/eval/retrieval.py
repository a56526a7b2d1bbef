"""Suite `retrieval`: does the embedding of one view find its partner among all held-out samples?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.eval.context import EvalContext
from mmctx.objectives.contrastive import matching_rows
from mmctx.sample import source_numbers

RANKS = (1, 5, 10)


@torch.no_grad()
def embed_views(context: EvalContext, objective: str) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Unit embeddings (P, E) of every held-out view, and the sample each belongs to."""
    head = context.model.objectives[objective]
    found: dict[str, list[Tensor]] = {}
    samples: dict[str, list[int]] = {}
    for batch in context.batches("retrieval", objective):
        hidden = context.model.encode(batch)
        for name, positions in batch.pooled.items():
            view = name.removeprefix(f"{objective}/")
            found.setdefault(view, []).append(head.embed(hidden, positions, batch.pool_sizes[name]).cpu())  # type: ignore[operator]
            samples.setdefault(view, []).extend(batch.pairs[name])
    return {view: torch.cat(parts) for view, parts in found.items()}, samples


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
    lower bound. The first text is called `text`, others `text1`, `text2`; a second similarity objective prefixes its name. Several
    held-out sources are searched together, and each by itself: `image_to_text in SOURCE`.
    """
    results: dict[str, Any] = {}
    by_source: dict[str, Any] = {}
    for objective in (names := context.names("similarity")):
        embeddings, samples = embed_views(context, objective)
        data = context.data.only(objective).dataset
        prefix = "" if objective == names[0] else f"{objective}/"
        for a, b in context.objectives[objective].pairs:  # type: ignore[union-attr]
            if a not in embeddings or b not in embeddings:
                continue
            rows_a, rows_b = matching_rows(np.asarray(samples[a]), np.asarray(samples[b]))
            if not len(rows_a):
                continue
            scores = embeddings[a][rows_a] @ embeddings[b][rows_b].T
            results |= _both_ways(f"{prefix}{_label(a)}", _label(b), scores)
            owner = torch.from_numpy(source_numbers(np.asarray(samples[a])[rows_a]))
            if len(numbers := owner.unique().tolist()) > 1:
                for number in numbers:
                    mine = (owner == number).nonzero()[:, 0]
                    found = _both_ways(f"{prefix}{_label(a)}", _label(b), scores[mine][:, mine])
                    by_source.update({f"{name} in {data.tables[number].source.name}": r for name, r in found.items()})
    return results | by_source


def _both_ways(a: str, b: str, scores: Tensor) -> dict[str, Any]:
    return {f"{a}_to_{b}": recall(scores), f"{b}_to_{a}": recall(scores.T)}


def _label(view: str) -> str:
    return "text" if view == "text0" else view
