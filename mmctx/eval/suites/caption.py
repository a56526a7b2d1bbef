"""Suite `caption`: what does the model say of pictures and clips it has never met?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.datasets.fetch import PackedDataset
from mmctx.datasets.planning.plan import Bin
from mmctx.errors import MmctxError, SampleError
from mmctx.eval.context import EvalContext, each
from mmctx.generate import generate
from mmctx.pack import IGNORE_INDEX, Document, pack_documents


@dataclass(frozen=True)
class Caption:
    """One generated text.

    Attributes:
        kind: `image` or `audio`.
        key: the sample.
        reference: its own text.
        prediction: what the model wrote.
        location: (source, sample id) to find the media again.
    """

    kind: str
    key: str
    reference: str
    prediction: str
    location: tuple[str, int]


def evaluate_caption(context: EvalContext) -> dict[str, Any]:
    """`{"image_cer", "image_wer", "image_exact", "image_n", "audio_cer", ...}` and, under `examples`, the first texts.

    Error rates are jiwer's, over the whole corpus of lower-cased texts; `exact` is the share of texts reproduced to the letter.
    """
    captions = list(generate_captions(context))
    result: dict[str, Any] = {}
    for kind in ("image", "audio"):
        found = [caption for caption in captions if caption.kind == kind]
        if found:
            scores = error_rates([c.reference for c in found], [c.prediction for c in found])
            result |= {f"{kind}_{name}": value for name, value in scores.items()}
    shown = [
        c for kind in ("image", "audio") for c in [c for c in captions if c.kind == kind][: context.config.num_examples]
    ]
    result["examples"] = [
        {
            "kind": c.kind,
            "key": c.key,
            "reference": c.reference,
            "prediction": c.prediction,
            "location": list(c.location),
        }
        for c in shown
    ]
    return result


def error_rates(references: list[str], predictions: list[str]) -> dict[str, float]:
    """Character and word error rate (edits over reference length), and the share of exact matches, of lower-cased texts."""
    try:
        import jiwer
    except ImportError:
        raise MmctxError("the caption suite needs jiwer: pip install 'mmctx[eval]'") from None
    references, predictions = (
        [" ".join(text.lower().split()) for text in texts] for texts in (references, predictions)
    )
    return {
        "cer": float(jiwer.cer(references, predictions)),
        "wer": float(jiwer.wer(references, predictions)),
        "exact": float(np.mean([r == p for r, p in zip(references, predictions, strict=True)])),
        "n": len(references),
    }


def generate_captions(context: EvalContext) -> Iterator[Caption]:
    """A text for every held-out picture and clip that has one to compare with."""
    for objective in context.names("captioning")[:1]:
        data, bins = context.bins(objective)
        yield from each(context.map("caption", bins, lambda bin, data=data: _captions(context, data, bin)))


def _captions(context: EvalContext, data: RunData, bin: Bin) -> list[Caption]:
    prompts = list(_prompts(data.dataset, bin))
    if not prompts:
        return []
    batch = pack_documents([p.document for p in prompts], data.tokenizer.placeholder_ids).to(context.device)
    texts = generate(context.model, batch, data.tokenizer.eos_id, context.config.max_new_tokens)
    found = []
    for ids, prompt in zip(texts, prompts, strict=True):
        kind, key = prompt.document.media[0][1].kind, prompt.document.key
        found.append(
            Caption(kind, key, data.tokenizer.decode(prompt.answer), data.tokenizer.decode(ids), prompt.location)
        )
    return found


class _Prompt(NamedTuple):
    document: Document
    answer: np.ndarray
    location: tuple[str, int]


def _prompts(dataset: PackedDataset, bin: Bin) -> Iterator[_Prompt]:
    """The captioning documents of a bin, cut before their text."""
    for number, sample_id, epoch, part in bin.samples:
        try:
            documents = dataset.documents(number, sample_id, epoch, part)
        except SampleError as error:
            dataset.note(number, sample_id, error)
            continue
        for document in documents:
            if len(document.media) != 1 or document.media[0][0] != 0:
                continue  # plain text, or an interleaved document: there is no single caption to compare with
            cut = (
                int(np.flatnonzero(document.labels != IGNORE_INDEX)[0]) + 1
            )  # behind the medium, and the prompt if there is one
            prompt = replace(document, input_ids=document.input_ids[:cut], labels=document.labels[:cut])
            yield _Prompt(prompt, document.input_ids[cut:], (dataset.sources[number][0].name, sample_id))
