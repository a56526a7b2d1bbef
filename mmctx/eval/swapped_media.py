"""Suite `swapped_media`: does the text that is written depend on the pictures and clips that stand before it?

A control: the held-out loss of each captioning objective, once as it is and once with the media of another sample in the same places. A
model that looks and listens is worse with the wrong ones; one that does not loses nothing.

Shapes: N documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import plan_once
from mmctx.errors import SampleError
from mmctx.eval.context import EvalContext
from mmctx.eval.zero_shot import log_probs
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaItem

NUM_RESAMPLES = 1000


def evaluate_swapped_media(context: EvalContext) -> dict[str, Any]:
    """`{OBJECTIVE: {"own", "swapped", "low", "high", "n", "documents"}}`: mean losses of the tokens behind each document's first medium.

    `low` to `high` is the 95% bootstrap interval of `swapped - own` over documents. Nothing where fewer than two samples have media.
    """
    results: dict[str, Any] = {}
    for objective in context.names("captioning"):
        own: list[float] = []
        swapped: list[float] = []
        counts: list[int] = []
        for document, other in _pairs(context, context.data.only(objective)):
            right, wrong = (-float(log_probs(context, [d])[0]) for d in (document, other))
            own.append(right)
            swapped.append(wrong)
            counts.append(int((document.labels != IGNORE_INDEX).sum()))
        if counts:
            results[objective] = compare(np.array(own), np.array(swapped), np.array(counts))
    return results


def compare(own: np.ndarray, swapped: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Mean losses of summed ones (N,), over `counts` (N,) tokens, and the interval of their difference."""
    rows = np.random.default_rng(0).integers(0, len(counts), (NUM_RESAMPLES, len(counts)))
    differences = (swapped - own)[rows].sum(axis=1) / counts[rows].sum(axis=1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "own": float(own.sum() / counts.sum()),
        "swapped": float(swapped.sum() / counts.sum()),
        "low": float(low),
        "high": float(high),
        "n": int(counts.sum()),
        "documents": len(counts),
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


def _pairs(context: EvalContext, data: RunData) -> Iterator[tuple[Document, Document]]:
    """Each causal document with media, and it with those of the sample read before, or of the nearest one before that has the kinds."""
    bins = plan_once(list(data.tables.values()), data.config.bin_tokens)
    units = [unit for bin in bins for unit in bin.samples]
    for place, unit in enumerate(units):
        context.report("swapped_media", place, len(units))
        for document in _documents(data, unit):
            kinds = {item.kind for _, item in document.media}
            for other in (units[place - back] for back in range(1, len(units))):
                donors = [item for d in _documents(data, other) for _, item in d.media]
                if other[:2] != unit[:2] and kinds <= {item.kind for item in donors}:
                    yield document, swap_media(document, donors)
                    break
    context.report("swapped_media", len(units), len(units))


def _documents(data: RunData, unit: tuple[int, int, int, int]) -> list[Document]:
    """The documents with media of a sample or a part of one; with labels of those tokens alone that some medium stands before."""
    number, sample_id, epoch, part = unit
    try:
        documents = data.dataset.documents(number, sample_id, epoch, part)
    except SampleError as error:
        data.dataset.note(number, sample_id, error)
        return []
    return [_behind_media(document) for document in documents if document.media]


def _behind_media(document: Document) -> Document:
    """With the labels of tokens that some medium stands before, alone."""
    offset, item = document.media[0]
    labels = document.labels.copy()
    labels[: offset + item.num_tokens - 1] = IGNORE_INDEX
    return replace(document, labels=labels)
