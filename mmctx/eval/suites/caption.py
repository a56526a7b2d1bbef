"""Suite `caption`: what does the model say of pictures and clips it has never met?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.planning.plan import Bin
from mmctx.datasets.shards.contents import parse_json, read_text
from mmctx.eval.caption_scores import error_rates, overlap_scores
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import documents_of
from mmctx.generate import generate
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, pack_documents


@dataclass(frozen=True)
class Caption:
    """One generated text.

    Attributes:
        kind: `image` or `audio`.
        key: the sample.
        references: texts that are right; its own first, as the model was to write it.
        prediction: what the model wrote.
        location: (source, sample id) to find the media again.
    """

    kind: str
    key: str
    references: tuple[str, ...]
    prediction: str
    location: tuple[str, int]


def evaluate_caption(context: EvalContext) -> dict[str, Any]:
    """`{"image_cer", "image_wer", "image_exact", "image_n", "image_bleu_1", ..., "audio_cer", ...}`; under `examples` the first texts, and
    under `left_out` the scores that the data are too few for.

    Error rates are of the text that the model was to write, for pictures and clips; `exact` is the share that it reproduced to the letter.
    Pictures have BLEU, ROUGE-L and CIDEr, too, against all of `eval.caption.references`. A second captioning objective prefixes its name.
    """
    results: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for objective in (names := context.names("captioning")):
        captions = list(generate_captions(context, objective))
        for kind in MODALITIES:
            found = [caption for caption in captions if caption.kind == kind]
            if not found:
                continue
            prefix = f"{kind}_" if objective == names[0] else f"{objective}/{kind}_"
            scores, missing = score_captions(kind, found)
            results |= {prefix + name: value for name, value in scores.items()}
            left_out |= {prefix + name: reason for name, reason in missing.items()}
            examples += [_example(caption) for caption in found[: context.config.num_examples]]
    return results | {"examples": examples} | ({"left_out": left_out} if left_out else {})


def score_captions(kind: str, captions: Sequence[Caption]) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of texts about one kind of media, and what was left out, with the reason."""
    predictions = [caption.prediction for caption in captions]
    rates = error_rates([caption.references[0] for caption in captions], predictions)
    if kind != "image":
        return rates, {}
    overlap, left_out = overlap_scores([caption.references for caption in captions], predictions)
    return rates | overlap, left_out


def generate_captions(context: EvalContext, objective: str) -> Iterator[Caption]:
    """A text for every held-out picture and clip that has one to compare with."""
    data, bins = context.bins(objective)
    yield from each(context.map("caption", bins, lambda bin: _captions(context, data, bin)))


def _example(caption: Caption) -> dict[str, Any]:
    return {
        "kind": caption.kind,
        "key": caption.key,
        "reference": caption.references[0],
        "references": list(caption.references),
        "prediction": caption.prediction,
        "location": list(caption.location),
    }


def _captions(context: EvalContext, data: RunData, bin: Bin) -> list[Caption]:
    prompts = list(_prompts(data, bin, context.config.caption.references))
    if not prompts:
        return []
    batch = pack_documents([p.document for p in prompts], data.tokenizer.placeholder_ids).to(context.device)
    texts = generate(context.model, batch, data.tokenizer.eos_id, context.config.max_new_tokens)
    return [
        Caption(p.document.media[0][1].kind, p.document.key, p.references, data.tokenizer.decode(ids), p.location)
        for ids, p in zip(texts, prompts, strict=True)
    ]


class _Prompt(NamedTuple):
    document: Document
    references: tuple[str, ...]
    location: tuple[str, int]


def _prompts(data: RunData, bin: Bin, more: Sequence[int]) -> Iterator[_Prompt]:
    """The captioning documents of a bin, cut before their text."""
    for (number, sample_id, *_), document in documents_of(data.dataset, bin):
        if len(document.media) != 1 or document.media[0][0] != len(data.tokenizer.begin):
            continue  # plain text, or an interleaved document: there is no single caption to compare with
        # behind the medium, and the prompt if there is one
        cut = int(np.flatnonzero(document.labels != IGNORE_INDEX)[0]) + 1
        prompt = replace(document, input_ids=document.input_ids[:cut], labels=document.labels[:cut])
        own = data.tokenizer.decode(document.input_ids[cut:])
        others = [text for text in _texts(data, number, sample_id, more) if text != own] if more else []
        yield _Prompt(prompt, (own, *others), (data.dataset.sources[number][0].name, sample_id))


def _texts(data: RunData, number: int, sample_id: int, wanted: Sequence[int]) -> Iterator[str]:
    """Texts of a sample by their numbers; those that it lacks are passed over."""
    source, config = data.dataset.sources[number]
    members = source.read(sample_id).members
    for text in (config.texts[n] for n in wanted if n < len(config.texts)):
        if (found := read_text(text, members, parse_json(members))) is not None:
            yield found
