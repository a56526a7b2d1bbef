"""Suite `zero_shot`: which of a list of classes does a picture or clip show, without a classifier having been trained?

With a similarity objective, as CLIP does it (Radford et al. 2021): a class is the mean of the unit embeddings of its texts, one a
template, made a unit vector again; the class nearest to the picture counts. With a captioning objective a class scores the
log-probability that the model writes its text, to the end, after the picture; of several templates, that of one drawn at random.

Shapes: C classes, T texts (templates), M media, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.datasets.shards.contents import parse_json, read_text
from mmctx.errors import ConfigError
from mmctx.eval.config import EvalConfig
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import Place, documents_of, grouped, num_tokens
from mmctx.eval.intervals import wilson_interval
from mmctx.eval.suite_config import ZeroShotConfig
from mmctx.eval.token_losses import token_losses
from mmctx.eval.views import embed_documents
from mmctx.objectives.base import ids
from mmctx.objectives.similarity import Similarity
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document
from mmctx.sample import Sample

TOP = 5


@dataclass(frozen=True, slots=True)
class Scored:
    """One picture or clip against all classes.

    Attributes:
        kind: `image` or `audio`.
        label: number of its class, None where it is none of them.
        rank: 1 if its class scores above all others. Ties count against it: a model that scores all classes alike ranks it last.
    """

    kind: str
    label: int | None
    rank: int


def evaluate_zero_shot(context: EvalContext) -> dict[str, Any]:
    """`{"image/OBJECTIVE": {"top1", "low", "high", "top5", "mean_per_class", "chance", "n", "per_class"}, "audio/OBJECTIVE": ...}`.

    `low` to `high` is the Wilson interval of `top1`; `top5` stands where there are more than five classes. Samples whose label is none
    of the classes do not count; `unlabelled` says how many there are, where there are any.

    Raises:
        ConfigError: `eval.zero_shot` names no classes.
    """
    return score_classes(context, "zero_shot", MODALITIES)


def score_classes(context: EvalContext, suite: str, media: Sequence[str]) -> dict[str, Any]:
    """See `evaluate_zero_shot`: of some kinds of media alone, for a suite whose progress is told."""
    config = _classes(context.config)
    results: dict[str, Any] = {}
    for kind, make in {"similarity": _by_similarity, "captioning": _by_captioning}.items():
        for objective in context.names(kind):
            data, bins = context.bins(objective)
            found = list(each(context.map(suite, bins, make(context, config, data, objective, media))))
            for medium in media:
                if mine := [scored for scored in found if scored.kind == medium]:
                    results[f"{medium}/{objective}"] = summarise(mine, list(config.names))
    return results


def zero_shot_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """`top1` and `top5` of each medium and objective."""
    return {f"{name}/{top}": found[top] for name, found in results.items() for top in ("top1", "top5") if top in found}


def summarise(found: Sequence[Scored], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy over all, by class and as the mean over the classes that occur, with chance and the interval; see `evaluate_zero_shot`."""
    known = [scored for scored in found if scored.label is not None]
    unlabelled = {"unlabelled": len(found) - len(known)} if len(known) < len(found) else {}
    if not known:
        return {"n": 0, **unlabelled}
    hits = np.array([scored.rank == 1 for scored in known])
    owner = np.array([scored.label for scored in known])
    per_class = {labels[number]: float(hits[owner == number].mean()) for number in np.unique(owner)}
    low, high = wilson_interval(int(hits.sum()), len(known))
    top = {"top5": float(np.mean([scored.rank <= TOP for scored in known]))} if len(labels) > TOP else {}
    return {
        "top1": float(hits.mean()),
        "low": low,
        "high": high,
        **top,
        "mean_per_class": float(np.mean(list(per_class.values()))),
        "chance": 1 / len(labels),
        "n": len(known),
        **unlabelled,
        "per_class": per_class,
    }


def check_zero_shot(config: EvalConfig) -> None:
    """Raises ConfigError if there are no classes."""
    _classes(config)


def _classes(config: EvalConfig) -> ZeroShotConfig:
    if config.zero_shot is None:
        raise ConfigError("suite zero_shot needs eval.zero_shot, for example eval.zero_shot.classes=[cat, dog]")
    return config.zero_shot


def class_vectors(embeddings: Tensor) -> Tensor:
    """Unit embeddings (C, T, E) of all texts -> (C, E): each class the mean of its own, as a unit vector (as clip_benchmark)."""
    return torch.nn.functional.normalize(embeddings.mean(dim=1), dim=-1)


def _scored(kind: str, label: int | None, scores: Tensor) -> Scored:
    """Where the class `label` stands among `scores` (C,)."""
    return Scored(kind, label, 0 if label is None else int((scores >= scores[label]).sum()))


def _texts(config: ZeroShotConfig) -> list[list[str]]:
    """C lists of T texts."""
    return [[template.replace("{}", name) for template in config.templates] for name in config.names.values()]


def _label(data: RunData, config: ZeroShotConfig, place: Place) -> int | None:
    """Number of a sample's class, None where it has none of them."""
    raw = data.dataset.tables[place[0]].source.read(place[1])
    label = read_text(config.label, raw.members, parse_json(raw.members))
    return {name: number for number, name in enumerate(config.names)}.get((label or "").strip())


def _by_similarity(
    context: EvalContext, config: ZeroShotConfig, data: RunData, objective: str, media: Sequence[str]
) -> Callable[[Bin], list[Scored]]:
    """Media of a bin against the embeddings of the class texts, each against the text view that it is paired with."""
    half = data.dataset.objectives[objective]
    assert isinstance(half, Similarity)
    pairs = ((a, b) for pair in half.config.pairs for a, b in (pair, pair[::-1]))
    partners = {medium: text for medium, text in pairs if medium in media and text.startswith("text")}
    texts = [data.tokenizer.encode(text) for written in _texts(config) for text in written]
    samples = [Sample("", "", number) for number in range(len(texts))]
    classes: dict[str, Tensor] = {}
    for view in set(partners.values()):
        documents = [half.view_document(sample, view, text) for sample, text in zip(samples, texts, strict=True)]
        classes[view] = class_vectors(
            _embedded(context, objective, documents).unflatten(0, (-1, len(config.templates)))
        )

    def score(bin: Bin) -> list[Scored]:
        placed = [found for found in documents_of(data.dataset, bin) if found.document.view in partners]
        found: list[Scored] = []
        for medium, vectors, *_ in embed_documents(context, objective, [d for _, d in placed]) if placed else ():
            labels = [_label(data, config, place) for place, document in placed if document.view == medium]
            scores = torch.from_numpy(vectors) @ classes[partners[medium]].T  # (M, C)
            found += [_scored(medium, label, row) for label, row in zip(labels, scores, strict=True)]
        return found

    return score


@torch.no_grad()
def _embedded(context: EvalContext, objective: str, documents: Sequence[Document]) -> Tensor:
    """Unit embeddings (N, E) of documents of one view, a bin's worth at a time."""
    groups = grouped(documents, num_tokens(documents), context.data.config.bin_tokens)
    return torch.cat([torch.from_numpy(embed_documents(context, objective, group)[0][1]) for group in groups])


def _by_captioning(
    context: EvalContext, config: ZeroShotConfig, data: RunData, objective: str, media: Sequence[str]
) -> Callable[[Bin], list[Scored]]:
    """Media of a bin against what the model would write of them: each class text is written behind each medium and scored.

    Documents count that begin with their one medium: a caption's, not a whole book's.
    """
    ending = ids(data.tokenizer.eos_id)
    texts = [np.concatenate([data.tokenizer.encode(text), ending]) for written in _texts(config) for text in written]

    def score(bin: Bin) -> list[Scored]:
        found = documents_of(data.dataset, bin)
        asked = [
            (place, document)
            for place, document in found
            if [(at, item.kind in media) for at, item in document.media] == [(len(data.tokenizer.begin), True)]
        ]
        documents = [_continued(document, text) for _, document in asked for text in texts]
        sums = torch.tensor([-float(losses.sum()) for losses in token_losses(context, documents)])
        shape = len(asked), len(config.names), len(config.templates)
        scores = sums.view(shape).logsumexp(dim=2)  # (M, C), up to a constant
        labels = [_label(data, config, place) for place, _ in asked]
        kinds = [document.media[0][1].kind for _, document in asked]
        return [_scored(kind, label, row) for kind, label, row in zip(kinds, labels, scores, strict=True)]

    return score


def _continued(document: Document, text: np.ndarray) -> Document:
    """What stands before the text of a captioning document, its medium and prompt, with another text, which alone is predicted."""
    start = int(np.flatnonzero(document.labels != IGNORE_INDEX)[0]) + 1
    input_ids = np.concatenate([document.input_ids[:start], text])
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[start - 1 : -1] = text
    return replace(document, input_ids=input_ids, labels=labels)
