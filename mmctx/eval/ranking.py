"""Where the right candidate ranks among all, several of which may be right, and what chance would make of it.

Shapes: Q queries, C candidates, K keys, R queries of a tile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.eval.intervals import wilson_interval

CUTS = (1, 5, 10)
"""The k of R@k."""
TILE_ELEMENTS = 1 << 22
"""Scores held at a time: 16 MiB in fp32."""


def best_ranks(
    queries: Tensor, candidates: Tensor, query_keys: np.ndarray, candidate_keys: np.ndarray, tile: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each query's best right candidate, from 1, and how many of the candidates are right. No (Q, C) matrix is held.

    A candidate is right if it shares a key with the query. Wrong candidates of the same score rank before it: a model that gives every pair
    the same score finds nothing.

    Args:
        queries: (Q, E).
        candidates: (C, E).
        query_keys: (Q, K) int64; each query has a right candidate.
        candidate_keys: (C, K) int64. Keys are compared within their column; negative ones match nothing.
        tile: R; by default as many as keep `TILE_ELEMENTS` scores.

    Returns:
        (Q,) int64 ranks and (Q,) int64 numbers of right candidates.
    """
    tile = tile or max(1, TILE_ELEMENTS // max(len(candidates), 1))
    wanted, offered = torch.from_numpy(query_keys), torch.from_numpy(candidate_keys)
    ranks, numbers = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for start in range(0, len(queries), tile):
        with torch.autocast(queries.device.type, enabled=False):  # in bf16 many scores would be equal
            scores = queries[start : start + tile] @ candidates.T  # (R, C)
        right = torch.zeros_like(scores, dtype=torch.bool)
        for mine, theirs in zip(wanted[start : start + tile].T, offered.T, strict=True):
            right |= (mine[:, None] == theirs) & (mine[:, None] >= 0)
        best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(dim=1))
        numbers.append(right.sum(dim=1))
    return torch.cat(ranks).numpy(), torch.cat(numbers).numpy()


def score_ranks(ranks: np.ndarray, positives: np.ndarray, num_candidates: int) -> dict[str, Any]:
    """R@k, the share of queries with a right candidate among the first k; MRR, the mean of 1 / rank; and what random ranks would give.

    Args:
        ranks: (Q,) from 1.
        positives: (Q,) right candidates of each.
        num_candidates: C.

    Returns:
        `{"R@1", "R@5", "R@10", "MRR", "n", "candidates", "positives", "chance": {"R@1", ...}, "interval": {"R@1": [low, high], ...}}`:
        `positives` are the mean, `interval` is Wilson's of 95%.
    """
    hits = {k: int((ranks <= k).sum()) for k in CUTS}
    return {
        **{f"R@{k}": hits[k] / len(ranks) for k in CUTS},
        "MRR": float((1 / ranks).mean()),
        "n": len(ranks),
        "candidates": num_candidates,
        "positives": float(positives.mean()),
        "chance": chance(positives, num_candidates),
        "interval": {f"R@{k}": list(wilson_interval(hits[k], len(ranks))) for k in CUTS},
    }


def chance(positives: Sequence[int] | np.ndarray, num_candidates: int) -> dict[str, float]:
    """R@k and MRR of candidates in random order, of which so many are right for each query: the first right one has rank r with
    probability `C(C - r, P - 1) / C(C, P)`.
    """
    expected = np.zeros(len(CUTS) + 1)
    for number, count in Counter(int(p) for p in positives).items():
        first = _first_rank(number, num_candidates)
        expected += count * np.array(
            [*(first[:k].sum() for k in CUTS), (first / np.arange(1, num_candidates + 1)).sum()]
        )
    return dict(zip([*(f"R@{k}" for k in CUTS), "MRR"], (expected / len(positives)).tolist(), strict=True))


def _first_rank(positives: int, candidates: int) -> np.ndarray:
    """(C,) probability of each rank for the first of the right candidates: none right so far, then one."""
    before = np.arange(candidates)
    left = candidates - before
    miss = np.clip((left - positives) / left, 0, 1)
    return np.concatenate([[1.0], np.cumprod(miss)[:-1]]) * np.minimum(positives / left, 1)
