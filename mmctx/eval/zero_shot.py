"""Suite `zero_shot`: which of a list of classes does a picture or clip show, without a classifier having been trained?

With a similarity objective, as CLIP does it (Radford et al. 2021): a class is the mean of the unit embeddings of its texts, one a
template, made a unit vector again; the class nearest to the picture counts. With a captioning objective a class scores the
log-probability that the model writes its text, to the end, after the picture; of several templates, that of one drawn at random.

Shapes: C classes, T texts (templates), M media, E embedding, K predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin, plan_once
from mmctx.datasets.shards.contents import parse_json, read_text
from mmctx.errors import ConfigError, SampleError
from mmctx.eval.config import ZeroShotConfig
from mmctx.eval.context import EvalContext
from mmctx.eval.recall import wilson_interval
from mmctx.objectives.base import ids
from mmctx.objectives.similarity import Similarity
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, pack_documents
from mmctx.sample import Sample, split_uid

TOP = 5
_ROWS = 1024  # logits (rows, V) held at a time


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
    config = context.config.zero_shot
    if config is None:
        raise ConfigError("suite zero_shot needs eval.zero_shot, for example eval.zero_shot.classes=[cat, dog]")
    results: dict[str, Any] = {}
    for kind, make in {"similarity": _by_similarity, "captioning": _by_captioning}.items():
        for objective in context.names(kind):
            data = context.data.only(objective)
            score = make(context, config, data, objective)
            found: list[Scored] = []
            bins = plan_once(list(data.tables.values()), data.config.bin_tokens)
            for done, bin in enumerate(bins):
                context.report("zero_shot", done, len(bins))
                found += score(bin)
            context.report("zero_shot", len(bins), len(bins))
            for medium in MODALITIES:
                if mine := [scored for scored in found if scored.kind == medium]:
                    results[f"{medium}/{objective}"] = summarise(mine, list(config.names))
    return results


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


def class_vectors(embeddings: Tensor) -> Tensor:
    """Unit embeddings (C, T, E) of all texts -> (C, E): each class the mean of its own, as a unit vector (as clip_benchmark)."""
    return torch.nn.functional.normalize(embeddings.mean(dim=1), dim=-1)


def _scored(kind: str, label: int | None, scores: Tensor) -> Scored:
    """Where the class `label` stands among `scores` (C,)."""
    return Scored(kind, label, 0 if label is None else int((scores >= scores[label]).sum()))


def _texts(config: ZeroShotConfig) -> list[list[str]]:
    """C lists of T texts."""
    return [[template.replace("{}", name) for template in config.templates] for name in config.names.values()]


def _label(data: RunData, config: ZeroShotConfig, number: int, sample_id: int) -> int | None:
    """Number of a sample's class, None where it has none of them."""
    raw = data.dataset.tables[number].source.read(sample_id)
    label = read_text(config.label, raw.members, parse_json(raw.members))
    return {name: place for place, name in enumerate(config.names)}.get((label or "").strip())


def _by_similarity(
    context: EvalContext, config: ZeroShotConfig, data: RunData, objective: str
) -> Callable[[Bin], list[Scored]]:
    """Media of a bin against the embeddings of the class texts, each against the text view that it is paired with."""
    half, head = data.dataset.objectives[objective], context.model.objectives[objective]
    assert isinstance(half, Similarity)
    partners = {a: b for pair in half.config.pairs for a, b in (pair, pair[::-1]) if a in MODALITIES}
    texts = [data.tokenizer.encode(text) for classes in _texts(config) for text in classes]
    classes: dict[str, Tensor] = {}
    for view in {view for view in partners.values() if view.startswith("text")}:
        documents = [half.view_document(Sample("", "", number), view, text) for number, text in enumerate(texts)]
        vectors = torch.cat([_embed(context, head, part, f"{objective}/{view}") for part in _parts(context, documents)])
        classes[view] = class_vectors(vectors.unflatten(0, (-1, len(config.templates))))

    def score(bin: Bin) -> list[Scored]:
        batch = data.dataset[bin].to(context.device)
        hidden = context.model.encode(batch)
        found = []
        for medium in (medium for medium in partners if partners[medium] in classes):
            name = f"{objective}/{medium}"
            if name not in batch.pooled:
                continue
            vectors = head.embed(hidden, batch.pooled[name], batch.pool_sizes[name])  # type: ignore[operator]
            scores = vectors.float() @ classes[partners[medium]].T  # (M, C)
            for uid, row in zip(batch.pairs[name], scores, strict=True):
                found.append(_scored(medium, _label(data, config, *split_uid(uid)), row))
        return found

    return torch.no_grad()(score)


@torch.no_grad()
def _embed(context: EvalContext, head: Any, documents: Sequence[Document], name: str) -> Tensor:
    """Unit embeddings (N, E) of documents of one view."""
    batch = pack_documents(documents, context.data.tokenizer.placeholder_ids).to(context.device)
    return head.embed(context.model.encode(batch), batch.pooled[name], batch.pool_sizes[name]).float()


def _by_captioning(
    context: EvalContext, config: ZeroShotConfig, data: RunData, objective: str
) -> Callable[[Bin], list[Scored]]:
    """Media of a bin against what the model would write of them: each class text is written behind each medium and scored."""
    ending = ids(data.tokenizer.eos_id)
    texts = [np.concatenate([data.tokenizer.encode(text), ending]) for classes in _texts(config) for text in classes]

    def score(bin: Bin) -> list[Scored]:
        prompts = list(_prompts(data, config, bin))
        documents = [_continued(prompt, text) for prompt, _ in prompts for text in texts]
        sums = torch.cat([torch.zeros(0), *(log_probs(context, part) for part in _parts(context, documents))])
        mixed = sums.view(len(prompts), len(config.names), len(config.templates)).logsumexp(
            dim=2
        )  # (M, C), up to a constant
        return [_scored(p.media[0][1].kind, label, row) for (p, label), row in zip(prompts, mixed, strict=True)]

    return score


def _prompts(data: RunData, config: ZeroShotConfig, bin: Bin) -> Iterator[tuple[Document, int | None]]:
    """What stands before the text of each captioning document of a bin, and its class. Only documents that begin with their one medium."""
    for number, sample_id, epoch, part in bin.samples:
        try:
            documents = data.dataset.documents(number, sample_id, epoch, part)
        except SampleError as error:
            data.dataset.note(number, sample_id, error)
            continue
        for document in documents:
            if [offset for offset, _ in document.media] == [0]:
                end = int(np.flatnonzero(document.labels != IGNORE_INDEX)[0]) + 1
                yield replace(document, input_ids=document.input_ids[:end]), _label(data, config, number, sample_id)


def _continued(prompt: Document, text: np.ndarray) -> Document:
    """A document of `prompt` and `text`, which alone is predicted."""
    input_ids = np.concatenate([prompt.input_ids, text])
    labels = np.full_like(input_ids, IGNORE_INDEX)
    labels[len(prompt.input_ids) - 1 : -1] = text
    return replace(prompt, input_ids=input_ids, labels=labels)


@torch.no_grad()
def log_probs(context: EvalContext, documents: Sequence[Document]) -> Tensor:
    """(N,) log-probability of the labelled tokens of each causal document, summed, on the host."""
    batch = pack_documents(documents, context.data.tokenizer.placeholder_ids).to(context.device)
    positions = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]  # (K,)
    hidden, labels = context.model.encode(batch)[positions], batch.labels[positions]
    found = []
    for states, targets in zip(hidden.split(_ROWS), labels.split(_ROWS), strict=True):
        logits = (states @ context.model.head_weight.T).float()  # normalised over all rows, as in training
        found.append(logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0])
    owner = torch.repeat_interleave(torch.tensor([int((d.labels != IGNORE_INDEX).sum()) for d in documents]))
    return torch.zeros(len(documents)).index_add(0, owner, torch.cat(found).cpu())


def _parts(context: EvalContext, documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in turn, as many at a time as fit into a bin, but one at least."""
    room = context.data.config.bin_tokens
    part: list[Document] = []
    held = 0
    for document in documents:
        if part and held + len(document.input_ids) > room:
            yield part
            part, held = [], 0
        part.append(document)
        held += len(document.input_ids)
    if part:
        yield part
