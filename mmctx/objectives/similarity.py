"""Similarity of views of one sample: picture, sound and texts in one space.

Every view becomes its own document, ended by the embedding token, whose hidden state is projected and normalised; or, with `pooling:
mean`, the mean of its states is (as in Sentence-BERT, Reimers & Gurevych 2019). Sentence pairs are two texts of a sample (`text0`,
`text1`), or `span0` and `span1`: neighbouring spans of one text, positives of each other without a label (Contriever's crops, Izacard et
al. 2022; DeCLUTR, Giorgi et al. 2021). What is made of the embeddings of a whole global step is in `contrastive`.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mmctx.objectives.base import ObjectiveConfig, ids, lay_out, text_column, text_of, token_counts
from mmctx.objectives.neighbours import draw_neighbours, neighbour_lengths, text_lengths, whole_text
from mmctx.pack import IGNORE_INDEX, MODALITIES, Document, MediaItem
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer


class SimilarityConfig(ObjectiveConfig):
    """Contrastive learning between the views of a sample."""

    kind: Literal["similarity"] = "similarity"
    pairs: tuple[tuple[str, str], ...] = (("image", "text0"), ("audio", "text0"))
    """Pairs of views to bring together: `image`, `audio`, `text0`, `text1` (the source's `texts`, counted from 0), `span0` and `span1`
    (neighbouring spans of one text)."""
    text: int = Field(default=0, ge=0)
    """Which of the source's `texts` the spans are cut from; a document of texts alone is cut as a whole."""
    span_tokens: int | None = Field(default=None, ge=1)
    """Longest span, from another place in each epoch; null cuts the text in the middle."""
    pooling: Literal["token", "mean"] = "token"
    """A view's embedding is the state of an embedding token behind it, or the mean over the states of its own tokens."""
    dim: int | None = None
    """Size of the embedding; null for the trunk's width."""
    causal: bool = False
    """Views attend to the past only, or (the default) in both directions."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over all candidates (InfoNCE, as CLIP), or a `sigmoid` for each pair (as SigLIP)."""
    negatives: Literal["all", "source"] = "all"
    """Which candidates of the global step a view is compared with: all, or those of its own source alone."""
    initial_temperature: float = Field(default=0.07, gt=0)
    """The learned scale starts at 1 / this, as in CLIP; SigLIP starts at 0.1."""
    initial_bias: float = -10.0
    """Where the learned bias of the sigmoid starts, as in SigLIP."""
    max_scale: float = Field(default=100.0, gt=0)
    """The learned scale is capped here."""

    @model_validator(mode="after")
    def _check(self) -> SimilarityConfig:
        if not self.pairs:
            raise ValueError("pairs must name at least one pair of views, for example [[image, text0]]")
        for view in self.views:
            if view not in MODALITIES and not re.fullmatch(r"text\d+|span[01]", view):
                raise ValueError(f"pairs knows the views image, audio, text0, text1, ..., span0, span1, not {view!r}")
        return self

    @property
    def views(self) -> tuple[str, ...]:
        """All views that some pair uses, each once."""
        return tuple(dict.fromkeys(view for pair in self.pairs for view in pair))


class Similarity:
    """Data half: one document a view. A sample with fewer than two of the views makes none; an interleaved document without media is a text
    that has spans, one with media has no views.
    """

    ahead, answers = 0, ()

    def __init__(self, name: str, config: SimilarityConfig, tokenizer: TextTokenizer) -> None:
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.causal, self.lead = config.causal, len(tokenizer.begin)
        self._ending = ids(tokenizer.embed_id) if config.pooling == "token" else ids()

    def room(self, context_length: int) -> int:
        """See `DataHalf`."""
        return context_length - self.lead - 1

    def lengths(self, sizes: SampleSizes) -> np.ndarray:
        """(n, number of views)."""
        lengths = np.stack([self._view_lengths(sizes, view) for view in self.config.views], axis=1)
        lengths[(lengths > 0).sum(axis=1) < 2] = 0
        return lengths

    def _view_lengths(self, sizes: SampleSizes, view: str) -> np.ndarray:
        kind, number = _parse(view)
        more = self.lead + len(self._ending)
        if kind == "span":
            spans = neighbour_lengths(text_lengths(sizes, self.config.text), self.config.span_tokens)
            return token_counts(spans[number], more)
        media = {"image": sizes.image_tokens, "audio": sizes.audio_tokens}
        found = media[kind] if kind in media else text_column(sizes, number)
        return np.where(sizes.interleaved, 0, token_counts(found, more))

    def labels(self, sizes: SampleSizes) -> np.ndarray:
        """(n,) zeros: embeddings pass no output head."""
        return np.zeros(len(sizes), np.int64)

    def pairs(self, sizes: SampleSizes) -> np.ndarray:
        """(n,): one for each sample that has views to compare."""
        return np.asarray((self.lengths(sizes) > 0).any(axis=1), np.int64)

    def documents(self, sample: Sample, rng: np.random.Generator, step: int | None = None) -> list[Document]:
        """See `DataHalf`."""
        found = self._views(sample, rng)
        views = {view: part for view in self.config.views if (part := found.get(view)) is not None}
        if len(views) < 2:
            return []
        return [self.view_document(sample, view, part) for view, part in views.items()]

    def _views(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray | MediaItem | None]:
        found: dict[str, np.ndarray | MediaItem | None] = {}
        if sample.segments is None:
            found |= {"image": sample.image, "audio": sample.audio}
            found |= {f"text{number}": text_of(sample, number) for number in range(len(sample.texts))}
        text = whole_text(sample, self.config.text)
        if text is not None and (spans := draw_neighbours(text, self.config.span_tokens, rng)) is not None:
            found |= {"span0": spans[0], "span1": spans[1]}
        return found

    def view_document(self, sample: Sample, view: str, part: np.ndarray | MediaItem) -> Document:
        """The document of one view: `part`, as a view of `sample`."""
        input_ids, media = lay_out([self.tokenizer.begin, part, self._ending], self.tokenizer.placeholder_ids)
        mean = self.config.pooling == "mean"
        return Document(
            objective=self.name,
            input_ids=input_ids,
            labels=np.full_like(input_ids, IGNORE_INDEX),
            causal=self.config.causal,
            media=media,
            pooled=self.lead if mean else len(input_ids) - 1,
            pool_size=len(input_ids) - self.lead if mean else 1,
            view=view,
            pair=sample.uid,
            key=sample.key,
        )


def _parse(view: str) -> tuple[str, int]:
    """`text1` -> (`text`, 1), `image` -> (`image`, 0)."""
    kind = view.rstrip("0123456789")
    return kind, int(view[len(kind) :] or 0)
