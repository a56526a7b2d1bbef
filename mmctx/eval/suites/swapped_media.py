"""Suite `swapped_media`: does the text that is written depend on the pictures and clips that stand before it?

A control: the held-out loss of each captioning objective, once as it is and once with the media of another sample in the same places. A
model that looks and listens is worse with the wrong ones; one that does not loses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import Place, documents_of
from mmctx.eval.intervals import mean_of_documents
from mmctx.eval.token_losses import token_losses
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaItem

Losses = tuple[float, float, int]
"""Summed losses of a document with its own media and with those of another sample, and the number of predictions."""


def evaluate_swapped_media(context: EvalContext) -> dict[str, Any]:
    """`{OBJECTIVE: {"own", "swapped", "excess", "low", "high", "n", "documents"}}`: mean losses, in nats.

    Only tokens behind a document's first medium count. `excess` is `swapped - own`, `low` to `high` its 95% interval over documents.
    Nothing where fewer than two samples have media.
    """
    results: dict[str, Any] = {}
    for objective in context.names("captioning"):
        data, bins = context.bins(objective)
        places = [place for bin in bins for place in bin.samples]

        def read(number: int, data: RunData = data, places: Sequence[Place] = places) -> list[Losses]:
            pairs = list(_pairs(data, places, number))
            losses = [float(found.sum()) for found in token_losses(context, [d for pair in pairs for d in pair])]
            counts = [int((document.labels != IGNORE_INDEX).sum()) for document, _ in pairs]
            return list(zip(losses[::2], losses[1::2], counts, strict=True))

        found = list(each(context.map("swapped_media", range(len(places)), read)))
        if found:
            results[objective] = compare(found)
    return results


def swapped_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """What wrong media cost."""
    return {f"{objective}/excess": found["excess"] for objective, found in results.items()}


def compare(found: Sequence[Losses]) -> dict[str, Any]:
    """Mean losses over all predictions, and their difference with its interval; see `evaluate_swapped_media`."""
    excess = mean_of_documents([(swapped - own, count) for own, swapped, count in found])
    return {
        "own": mean_of_documents([(own, count) for own, _, count in found])["mean"],
        "swapped": mean_of_documents([(swapped, count) for _, swapped, count in found])["mean"],
        "excess": excess["mean"],
        "low": excess["low"],
        "high": excess["high"],
        "n": excess["n"],
        "documents": len(found),
    }


def swap_media(document: Document, donors: Sequence[MediaItem]) -> Document:
    """The document with its media replaced, in turn, by those of `donors` of the same kind, of which there must be one.

    Clips may be of other lengths: the text behind them moves, and is predicted all the same.
    """
    pools = {kind: itertools.cycle([item for item in donors if item.kind == kind]) for kind in MODALITIES}
    ids, labels, media, end, length = [], [], [], 0, 0
    for offset, item in document.media:
        other, after = next(pools[item.kind]), offset + item.num_tokens
        length += offset - end
        media.append((length, other))
        ids += [document.input_ids[end:offset], np.full(other.num_tokens, document.input_ids[offset])]
        slots = np.full(other.num_tokens, IGNORE_INDEX)
        slots[-1] = document.labels[after - 1]  # the last slot predicts the token behind
        labels += [document.labels[end:offset], slots]
        length, end = length + other.num_tokens, after
    ids.append(document.input_ids[end:])
    labels.append(document.labels[end:])
    return replace(document, input_ids=np.concatenate(ids), labels=np.concatenate(labels), media=tuple(media))


def _pairs(data: RunData, places: Sequence[Place], number: int) -> Iterator[tuple[Document, Document]]:
    """Each document with media of a place, and it with those of the nearest other sample before it that has the kinds."""
    for document in _documents(data, places[number]):
        kinds = {item.kind for _, item in document.media}
        for place in (places[number - back] for back in range(1, len(places))):
            if place[:2] == places[number][:2]:
                continue  # another part of the same sample
            donors = [item for other in _documents(data, place) for _, item in other.media]
            if kinds <= {item.kind for item in donors}:
                yield document, swap_media(document, donors)
                break


def _documents(data: RunData, place: Place) -> list[Document]:
    """The documents with media of a sample or a part of one; with labels of those tokens alone that some medium stands before."""
    found = documents_of(data.dataset, Bin((place,), tokens=0, cost=0))
    return [_behind_media(document) for _, document in found if document.media]


def _behind_media(document: Document) -> Document:
    """With the labels of tokens that some medium stands before, alone."""
    offset, item = document.media[0]
    labels = document.labels.copy()
    labels[: offset + item.num_tokens - 1] = IGNORE_INDEX
    return replace(document, labels=labels)
