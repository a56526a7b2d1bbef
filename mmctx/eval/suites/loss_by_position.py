"""Suite `loss_by_position`: does the model predict better the more it has read, and is it the far context that helps?

Three curves over held-out causal documents, in nats a predicted token:

- loss against position in the document, of all predictions and by the medium that stands last in front of them;
- truncation: the last predictions of long documents, when nothing but the k tokens before them is kept;
- shuffle: the same predictions, when all that lies further back than k tokens is there, but in a random order.

A model that uses its far context loses by both; where a curve is flat from some k on, nothing further back helps. Bands are 95% intervals
that take documents, not tokens, as independent (the linearised variance of a ratio, Cochran 1977, section 2.11).

Shapes: L tokens of a document, K labelled positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mmctx.datasets.planning.order import derive_key
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import Place, documents_of, excerpt
from mmctx.eval.intervals import mean_of_documents
from mmctx.eval.token_losses import token_losses
from mmctx.pack import IGNORE_INDEX, Document

_FIRST_EDGE = 16
_PIECE = 16  # tokens of a text that stay together when the far context is shuffled

Sums = dict[tuple[str, int], tuple[float, int]]
"""By (modality, number of the stretch): sum of losses and their number, of one document."""


class _Cut(NamedTuple):
    """One document read with k tokens of context kept: sums over the same predictions."""

    kept: int
    whole: float
    truncated: float
    shuffled: float
    count: int


def evaluate_loss_by_position(context: EvalContext) -> dict[str, Any]:
    """`{"modalities": {"all" | "text" | "image" | "audio": {"edges", "mean", "low", "high", "n"}}, "truncation", "shuffle"}`.

    Stretch i of a curve goes from `edges[i][0]` up to `edges[i][1]`. `truncation` and `shuffle` hold, for each entry of `kept`, the `mean`
    loss with its interval, the loss of the `whole` documents, the paired `excess` over it with its interval (`excess_low`, `excess_high`),
    and `documents`. Reads the first captioning objective that some held-out source serves; empty where there is none.
    """
    for objective in context.names("captioning")[:1]:
        data, bins = context.bins(objective)

        def read(bin: Any, data: Any = data) -> list[tuple[Place, int, int, Sums]]:
            found = list(documents_of(data.dataset, bin))
            losses = token_losses(context, [document for _, document in found])
            return [
                (place, number, len(document.input_ids), _by_stretch(document, loss))
                for number, ((place, document), loss) in enumerate(zip(found, losses, strict=True))
            ]

        documents = list(each(context.map("loss_by_position", bins, read)))
        if not documents:
            return {}
        longest = sorted(documents, key=lambda found: (-found[2], found[0]))[
            : context.config.loss_by_position.documents
        ]
        places = list(dict.fromkeys(place for place, *_ in longest))
        cuts = list(each(context.map("loss_by_position", places, lambda place, d=data: _cuts(context, d, place))))
        return {
            "modalities": _curves([sums for *_, sums in documents]),
            "truncation": _excess(cuts, [cut.truncated for cut in cuts]),
            "shuffle": _excess(cuts, [cut.shuffled for cut in cuts]),
        }
    return {}


def position_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The loss in the first and the last stretch, and what the farthest context is worth: the excess at the largest k, truncated."""
    curve = results["modalities"]["all"]
    found = {"first": curve["mean"][0], "last": curve["mean"][-1]}
    truncated = results["truncation"]
    if truncated["kept"]:
        found[f"excess_without_all_but_{truncated['kept'][-1]}"] = truncated["excess"][-1]
    return found


def _by_stretch(document: Document, losses: Tensor) -> Sums:
    places = np.flatnonzero(document.labels != IGNORE_INDEX)
    # stretch 0 ends before _FIRST_EDGE, each further one is twice as far
    stretches = np.maximum(np.floor(np.log2(np.maximum(places, 1) / _FIRST_EDGE)).astype(int) + 1, 0)
    media = np.searchsorted([at for at, _ in document.media], places, side="right")
    sums: Sums = {}
    for stretch, number, loss in zip(stretches.tolist(), media.tolist(), losses.tolist(), strict=True):
        kind = document.media[number - 1][1].kind if number else "text"
        for name in ("all", kind):
            total, count = sums.get((name, stretch), (0.0, 0))
            sums[name, stretch] = total + loss, count + 1
    return sums


def _curves(documents: Sequence[Sums]) -> dict[str, Any]:
    curves = {}
    for kind in sorted({kind for sums in documents for kind, _ in sums}):
        numbers = sorted({number for sums in documents for k, number in sums if k == kind})
        points = [mean_of_documents([sums[kind, n] for sums in documents if (kind, n) in sums]) for n in numbers]
        edges = [[_start(number), _start(number + 1)] for number in numbers]
        curves[kind] = {
            "edges": edges,
            **{name: [point[name] for point in points] for name in ("mean", "low", "high", "n")},
        }
    return curves


def _start(stretch: int) -> int:
    return _FIRST_EDGE << (stretch - 1) if stretch else 0


def _cuts(context: EvalContext, data: Any, place: Place) -> list[_Cut]:
    """What the documents of one sample lose with each amount of context kept that is less than what they have."""
    config, cuts, begin = context.config.loss_by_position, [], (0, len(data.tokenizer.begin))
    for number, document in enumerate(data.dataset.documents(*place)):
        first = first_target(document, config.targets)
        kept = [k for k in config.kept if first is not None and _cut_at(document, first - k) > begin[1]]
        if first is None or not kept:
            continue
        variants = [_with_targets(document, document, first)]
        for k in kept:
            cut = _cut_at(document, first - k)
            rng = np.random.default_rng(derive_key(data.dataset.seed, "shuffle", document.key, number, k))
            kept_end = (cut, len(document.input_ids))
            for before in ((), shuffled_pieces(document, cut, rng, begin[1])):
                variants.append(_with_targets(excerpt(document, [begin, *before, kept_end]), document, first))
        whole, *others = [float(losses.sum()) for losses in token_losses(context, variants)]
        count = int((variants[0].labels != IGNORE_INDEX).sum())
        cuts += [
            _Cut(k, whole, truncated, shuffled, count)
            for k, truncated, shuffled in zip(kept, others[::2], others[1::2], strict=True)
        ]
    return cuts


def first_target(document: Document, targets: int) -> int | None:
    """Position of the first of the last `targets` labelled positions; None where there are none."""
    places = np.flatnonzero(document.labels != IGNORE_INDEX)
    return int(places[-targets:][0]) if len(places) else None


def _with_targets(variant: Document, document: Document, first: int) -> Document:
    """The variant, whose end is that of the document, with the labels from `first` on and no others."""
    labels = np.full_like(variant.input_ids, IGNORE_INDEX)
    count = len(document.labels) - first
    labels[-count:] = document.labels[first:]
    return replace(variant, labels=labels)


def _cut_at(document: Document, place: int) -> int:
    """`place`, or where the medium starts that it would cut in two."""
    for at, item in document.media:
        if at < place < at + item.num_tokens:
            return at
    return max(place, 0)


def shuffled_pieces(document: Document, end: int, rng: np.random.Generator, start: int = 0) -> list[tuple[int, int]]:
    """Spans that cover [start, end) once, in a random order: media whole, text in runs of a few tokens."""
    pieces: list[tuple[int, int]] = []
    media = [(at, at + item.num_tokens) for at, item in document.media if at < end]
    for at, stop in [*media, (end, end)]:
        pieces += [(place, min(place + _PIECE, at)) for place in range(start, at, _PIECE)]
        if stop > at:
            pieces.append((at, stop))
        start = stop
    return [pieces[number] for number in rng.permutation(len(pieces))]


def _excess(cuts: Sequence[_Cut], losses: Sequence[float]) -> dict[str, Any]:
    """One curve over k; `losses` are sums, one for each cut."""
    names = ("kept", "mean", "low", "high", "whole", "excess", "excess_low", "excess_high", "documents")
    curve: dict[str, list[Any]] = {name: [] for name in names}
    for kept in sorted({cut.kept for cut in cuts}):
        chosen = [(cut, loss) for cut, loss in zip(cuts, losses, strict=True) if cut.kept == kept]
        here = mean_of_documents([(loss, cut.count) for cut, loss in chosen])
        whole = mean_of_documents([(cut.whole, cut.count) for cut, _ in chosen])
        excess = mean_of_documents([(loss - cut.whole, cut.count) for cut, loss in chosen])
        values = [kept, here["mean"], here["low"], here["high"], whole["mean"]]
        values += [excess["mean"], excess["low"], excess["high"], len(chosen)]
        for name, value in zip(names, values, strict=True):
            curve[name].append(value)
    return curve
