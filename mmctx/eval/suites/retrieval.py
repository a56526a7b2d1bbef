"""Suite `retrieval`: does a view find its partner among all held-out samples?

Several candidates may be right. Besides the partner itself, everything that shows the same thing is: where samples share one picture
(pixels as the encoder sees them) under different names, each of these names is right for it; where two pictures have one name, either is.
A view that is paired with several texts, such as five captions of a picture, is also compared with all of them together
(`image_to_texts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmctx.eval.context import EvalContext
from mmctx.eval.ranking import best_ranks, score_ranks
from mmctx.eval.views import View, embed_views
from mmctx.objectives.contrastive import matching_rows
from mmctx.sample import source_numbers

SHOWN = ("R@1", "R@5", "R@10", "MRR")


def evaluate_retrieval(context: EvalContext) -> dict[str, Any]:
    """`{"image_to_text": {"R@1", "R@5", "R@10", "MRR", "n", ...}, ...}` in both directions of every configured pair of views, see
    `score_ranks`.

    A query is a hit if any right candidate ranks among the first k (as in CLIP's evaluations, and in clip_benchmark). The first text is
    called `text`, others `text1`, `text2`; a second similarity objective prefixes its name. Several held-out sources, such as languages,
    are searched all together, and each by itself, under `by_source` of each direction.
    """
    results: dict[str, Any] = {}
    for objective in (names := context.names("similarity")):
        views = embed_views(context, objective)
        pairs: Sequence[tuple[str, str]] = context.objectives[objective].pairs  # type: ignore[union-attr]
        prefix = "" if objective == names[0] else f"{objective}/"
        for direction, scores in _directions(views, pairs):
            results[prefix + direction] = scores
        tables = context.data.only(objective).dataset.tables
        for number, table in enumerate(tables if len(tables) > 1 else ()):
            mine = {
                name: view.take(np.flatnonzero(source_numbers(view.samples) == number)) for name, view in views.items()
            }
            for direction, scores in _directions(mine, pairs):
                results[prefix + direction].setdefault("by_source", {})[table.source.name] = scores
    return results


def retrieval_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """R@k and MRR of each direction, over all sources together."""
    return {f"{way}/{name}": scores[name] for way, scores in results.items() for name in SHOWN}


def _directions(views: Mapping[str, View], pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for a, b in pairs:
        if a in views and b in views and len(np.intersect1d(views[a].samples, views[b].samples)):
            yield f"{label(a)}_to_{label(b)}", score_pair(views[a], views[b])
            yield f"{label(b)}_to_{label(a)}", score_pair(views[b], views[a])
    for medium, texts in several_texts(pairs).items():
        present = [views[text] for text in texts if text in views]
        if medium in views and len(present) > 1:
            yield from _all_texts(medium, views[medium], present)


def label(view: str) -> str:
    """A view's name in results: the first text is `text`."""
    return "text" if view == "text0" else view


def partners(a: View, b: View) -> tuple[View, View]:
    """The samples that have both views, each once, place by place."""
    rows_a, rows_b = matching_rows(a.samples, b.samples)
    return a.take(rows_a), b.take(rows_b)


def score_pair(a: View, b: View) -> dict[str, Any]:
    """Scores of a's views as queries among b's: all samples that have both."""
    a, b = partners(a, b)
    keys = np.stack([a.contents, b.contents], axis=1)  # (n, 2)
    ranks, positives = best_ranks(a.embeddings, b.embeddings, keys, keys)
    return score_ranks(ranks, positives, len(b.samples))


def several_texts(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Views that are paired with more than one of the texts, with these."""
    found: dict[str, list[str]] = {}
    for pair in pairs:
        for medium, text in (pair, pair[::-1]):
            if text.startswith("text") and not medium.startswith("text"):
                found.setdefault(medium, []).append(text)
    return {medium: texts for medium, texts in found.items() if len(texts) > 1}


def _all_texts(medium: str, views: View, texts: Sequence[View]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A medium against all of its texts together, both ways: a text is right for every medium that has an equal text or is equal."""
    everything = [partners(views, text) for text in texts]
    media, _ = partners(views, _joined([shown for shown, _ in everything]))
    captions = _joined([text for _, text in everything])
    # keys: the medium's content, then one column for each text that a medium has; a caption offers itself in all of them
    shown = np.concatenate([mine.contents for mine, _ in everything])
    offered = np.column_stack([shown, *[captions.contents] * len(texts)])
    wanted = np.column_stack([media.contents, *(_contents(media.samples, text) for text in texts)])
    for name, (queries, candidates), (mine, theirs) in (
        (f"{label(medium)}_to_texts", (media, captions), (wanted, offered)),
        (f"texts_to_{label(medium)}", (captions, media), (offered, wanted)),
    ):
        ranks, positives = best_ranks(queries.embeddings, candidates.embeddings, mine, theirs)
        yield name, score_ranks(ranks, positives, len(candidates.samples))


def _joined(views: Sequence[View]) -> View:
    return View(
        torch.cat([view.embeddings for view in views]),
        np.concatenate([view.samples for view in views]),
        np.concatenate([view.contents for view in views]),
    )


def _contents(samples: np.ndarray, view: View) -> np.ndarray:
    """(n,) what each sample shows in a view, -1 where it has none."""
    found = np.full(len(samples), -1)
    rows, others = matching_rows(samples, view.samples)
    found[rows] = view.contents[others]
    return found
