"""Stores of random unit vectors, and what brute force finds in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmctx.store.entries import Document, Part
from mmctx.store.provenance import Provenance
from mmctx.store.store import Store

DIM = 24
MADE_BY = Provenance("made", "0123456789abcdef", DIM, ("text", "image"))


def unit_vectors(count: int, dim: int = DIM, seed: int = 0, rank: int = 8) -> np.ndarray:
    """(count, dim) float32 near one subspace of `rank` dimensions, whatever the seed, as the embeddings of one encoder are."""
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((count, rank)) @ np.random.default_rng(99).standard_normal((rank, dim))
    drawn += 0.3 * rng.standard_normal((count, dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def said(number: int, text: str = "") -> Document:
    """A document of one text."""
    return Document(f"d{number}", (Part("text", text or f"text {number}"),))


def text_store(path: Path, vectors: np.ndarray, at_once: int = 10_000) -> Store:
    """A store with the document `d{n}` for row n."""
    store = Store.create(path, Provenance("made", "0123456789abcdef", vectors.shape[1], ("text",)))
    for start in range(0, len(vectors), at_once):
        some = range(start, min(start + at_once, len(vectors)))
        store.write([said(n) for n in some], [[vectors[n]] for n in some])
    return store


def brute_force(
    queries: np.ndarray, vectors: np.ndarray, k: int, among: Sequence[int] | None = None
) -> list[list[int]]:
    """Row numbers of the k largest dot products with each query, in double precision."""
    rows = np.arange(len(vectors)) if among is None else np.asarray(among)
    scores = queries.astype(np.float64) @ vectors[rows].astype(np.float64).T
    return rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]].tolist()


def found_rows(store: Store, queries: np.ndarray, k: int, **options) -> list[list[int]]:
    """Row numbers of what a `text_store` finds."""
    return [[int(hit.id[1:]) for hit in hits] for hits in store.search(queries, k, **options)]
