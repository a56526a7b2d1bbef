"""Suite `attribution`: on which words, pictures and sounds do the model's answers rest?

For a few held-out documents the model writes the last text anew, and what it writes is explained by what stands before it, see
`mmctx.eval.attribution`. Scores are kept token by token, so that the report can draw them on the document itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from mmctx.datasets.assemble import RunData
from mmctx.errors import SampleError
from mmctx.eval.attribution import METHODS, Answer, attribute
from mmctx.eval.context import EvalContext
from mmctx.eval.documents import excerpt
from mmctx.eval.segments import segments_of, shares
from mmctx.generate import generate
from mmctx.pack import IGNORE_INDEX, Document, pack_documents

KINDS = ("image", "audio", "interleaved", "text")
"""Of documents: a picture or a clip with its text, several in reading order, text alone."""
SCALE = 999
"""Scores are written as whole numbers from -999 to 999, in shares of the greatest."""
_LOOKED_AT = 64  # samples of a source at most, evenly spread


class Chosen(NamedTuple):
    """A document to explain.

    Attributes:
        kind: one of `KINDS`.
        document: causal.
        cut: tokens that stand before the answer.
        location: (source, sample id, number of the document among those of the sample) to find it again.
    """

    kind: str
    document: Document
    cut: int
    location: tuple[str, int, int]


def evaluate_attribution(context: EvalContext) -> dict[str, Any]:
    """`{"by_kind": {KIND: {METHOD: share of media, ..., "media_tokens", "gap", "n"}}, "examples": [..]}`.

    The share of media is that of pictures and sounds in the absolute scores of all segments; `media_tokens`, their share of the tokens, is
    what scores that say nothing would give. Empty where no held-out document is causal.
    """
    for objective in context.names("captioning")[:1]:
        data = context.data.only(objective)
        chosen = list(choose(context, data))
        examples = context.map("attribution", chosen, lambda one, data=data: explain(context, data, one))
        if examples:
            return {"by_kind": _by_kind(examples), "examples": examples}
    return {}


def attribution_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The share of media in what answers rest on, by integrated gradients, where words stand beside them."""
    kinds = results.get("by_kind", {})
    return {f"{kind}_media": found["integrated"] for kind, found in kinds.items() if 0 < found["media_tokens"] < 1}


def choose(context: EvalContext, data: RunData) -> Iterator[Chosen]:
    """The first documents of each kind, in held-out order, of samples that are spread evenly over every source."""
    config = context.config.attribution
    wanted: dict[str, int] = dict.fromkeys(KINDS, config.documents)
    for number, table in enumerate(data.dataset.tables):
        step = max(1, table.num_samples // _LOOKED_AT)
        for sample_id in range(0, table.num_samples, step):
            if not any(wanted.values()):
                return
            try:
                documents = data.dataset.documents(number, sample_id, 0)
            except SampleError as error:
                data.dataset.note(number, sample_id, error)
                continue
            for place, document in enumerate(documents):
                kind, cut = _kind(document), answer_start(document, config.answer_tokens)
                if wanted[kind] and cut and len(document.input_ids) <= config.longest:
                    wanted[kind] -= 1
                    yield Chosen(kind, document, cut, (table.source.name, sample_id, place))


def answer_start(document: Document, longest: int) -> int:
    """Where the last text that is predicted begins, or its last `longest` tokens; 0 where nothing stands before it."""
    places = np.flatnonzero(document.labels != IGNORE_INDEX) + 1  # labels stand one place before their token
    if not document.causal or not len(places):
        return 0
    gaps = np.flatnonzero(np.diff(places) > 1)
    start = int(places[gaps[-1] + 1]) if len(gaps) else int(places[0])
    return max(start, int(places[-1]) + 1 - longest)


def explain(context: EvalContext, data: RunData, chosen: Chosen) -> dict[str, Any]:
    """One entry of `examples`: where the document is found, what the model says, and the scores of its context."""
    document, cut, tokenizer = chosen.document, chosen.cut, data.tokenizer
    config = context.config.attribution
    prompt = excerpt(document, [(0, cut)])
    packed = pack_documents([prompt], tokenizer.placeholder_ids).to(context.device)
    written = generate(context.model, packed, tokenizer.eos_id, config.answer_tokens)[0] or [tokenizer.eos_id]
    batch = pack_documents([continued(prompt, written[:-1])], tokenizer.placeholder_ids).to(context.device)
    with torch.autocast(context.device.type, enabled=False):
        found = attribute(context.model, batch, Answer(cut, tuple(written)), steps=config.steps)
    segments = segments_of(document, cut, tokenizer)
    is_media = np.array([segment.kind != "text" for segment in segments])
    media = {method: float(shares(found.scores[method], segments)[is_media].sum()) for method in METHODS}
    return {
        "kind": chosen.kind,
        "objective": document.objective,
        "key": document.key,
        "location": list(chosen.location),
        "cut": cut,
        "prediction": tokenizer.decode(written),
        "reference": tokenizer.decode(document.input_ids[cut:]),
        "log_prob": found.log_prob,
        "baseline": found.baseline,
        "gap": found.gap,
        "media": media,
        "media_tokens": sum(s.end - s.start for s in segments if s.kind != "text") / cut,
        "scores": {method: write_scores(found.scores[method]) for method in METHODS},
    }


def continued(prompt: Document, written: Sequence[int]) -> Document:
    """A prompt with tokens behind it, none of which is predicted."""
    input_ids = np.concatenate([prompt.input_ids, np.array(written, np.int64)])
    return replace(prompt, input_ids=input_ids, labels=np.full_like(input_ids, IGNORE_INDEX))


def write_scores(scores: np.ndarray) -> str:
    """Scores as text: whole numbers in units of a `SCALE`th of the greatest. A list would take a line of eval.json for each token."""
    greatest = np.abs(scores).max(initial=0.0)
    return (
        " ".join(map(str, np.rint(scores / greatest * SCALE).astype(int)))
        if greatest
        else " ".join("0" for _ in scores)
    )


def read_scores(text: str) -> np.ndarray:
    """What `write_scores` wrote, (C,) in -1 to 1."""
    return np.array(text.split(), float) / SCALE


def _kind(document: Document) -> str:
    if not document.media:
        return "text"
    (offset, item), *others = document.media
    return "interleaved" if others or offset else item.kind


def _by_kind(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for kind in dict.fromkeys(example["kind"] for example in examples):
        those = [example for example in examples if example["kind"] == kind]
        found[kind] = {
            **{method: float(np.mean([one["media"][method] for one in those])) for method in METHODS},
            "media_tokens": float(np.mean([one["media_tokens"] for one in those])),
            "gap": float(np.mean([one["gap"] for one in those])),
            "n": len(those),
        }
    return found
