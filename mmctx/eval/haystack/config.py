"""What documents of the long-context suites are made of, and which of them are asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel

NEEDLE_KINDS = (
    "single",
    "multi_key",
    "multi_value",
    "multi_query",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "picture",
    "picture_value",
    "picture_key",
    "picture_count",
    "sound",
    "sound_value",
    "sound_key",
    "sound_count",
    "picture_sound",
)
"""Kinds of the suite `needle`; `mmctx.eval.suites.needle` says what each asks."""
WORLD_TASKS = ("where_person", "where_object", "before", "has", "count")
"""Tasks of the suite `world`; `mmctx.eval.suites.world` says what each asks."""


class NoiseHaystack(StrictModel):
    """RULER's noise: a few plain sentences, over and over."""

    kind: Literal["noise"] = "noise"


class TextHaystack(StrictModel):
    """Stretches of texts, from a place drawn anew for each document."""

    kind: Literal["text"] = "text"
    path: str
    """A text file, or a folder whose `*.txt` files are read; `.gz` files are unpacked. It should be no text that the run is trained on."""


class SamplesHaystack(StrictModel):
    """Held-out samples of the run itself, in turn: interleaved pages, pictures with their names, clips with their transcripts."""

    kind: Literal["samples"] = "samples"
    sources: tuple[str, ...] = ()
    """Names among `eval.sources`; empty means all that captioning reads."""


AnyHaystack = Annotated[NoiseHaystack | TextHaystack | SamplesHaystack, Field(discriminator="kind")]


class GridConfig(StrictModel):
    """Documents of several lengths, with what is asked at several depths."""

    lengths: tuple[Annotated[int, Field(ge=16)], ...] | None = None
    """Lengths in model tokens. null: powers of two from 256 up to `data.context_length`. Longer ones than that can be asked."""
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where needles stand: 0 at the start of the document, 1 right before the question."""
    samples: int = Field(default=4, ge=1)
    """Documents for each length and depth. What has no depth gets as many documents a length as all depths together."""
    candidates: int = Field(default=8, ge=2)
    """Answers that the right one is told from by log-probability; chance is one in so many."""
    haystack: AnyHaystack = NoiseHaystack()
    """What needles are hidden in."""
    generate: bool = True
    """Also let the model write its answer, for exact matches; costs about as much time again."""
    seed: int = 0
    """Everything random is drawn from it; training documents never come from the same draws."""

    @model_validator(mode="after")
    def _check(self) -> GridConfig:
        for name in ("lengths", "depths"):
            values = getattr(self, name)
            if values is not None and (not values or list(values) != sorted(set(values))):
                raise ValueError(f"{name} {list(values)} must be given in rising order, each once, and at least one")
        return self

    def resolved_lengths(self, context_length: int) -> tuple[int, ...]:
        """The lengths, those by default included: below 256 tokens of context that is the context itself."""
        if self.lengths is not None:
            return self.lengths
        found = [256 << n for n in range(64) if 256 << n <= context_length]
        return tuple(found) or (context_length,)


class NeedleConfig(GridConfig):
    """Suite `needle`."""

    kinds: tuple[Literal[NEEDLE_KINDS], ...] = NEEDLE_KINDS  # type: ignore[valid-type]
    """Which kinds are asked. Those whose material or modality is lacking are left out, and the results say why."""
    needles: int = Field(default=3, ge=2)
    """Needles of kinds that have several: values, queries, variables of a chain, words, boxes; and keys beside the one that is asked."""
    digits: int = Field(default=7, ge=3, le=18)
    """Digits of magic numbers, as in RULER; small tokenizers take a token for each."""
    sources: tuple[str, ...] = ()
    """Names among `eval.sources` whose pictures and clips are needles; empty means all that captioning reads."""
    media: int = Field(default=128, ge=1)
    """Samples of each of these sources that are looked at, evenly spaced."""


class PasskeyConfig(GridConfig):
    """Suite `passkey`."""

    digits: int = Field(default=5, ge=3, le=18)
    """Digits of the pass key."""


class WorldConfig(GridConfig):
    """Suite `world`."""

    tasks: tuple[Literal[WORLD_TASKS], ...] = WORLD_TASKS  # type: ignore[valid-type]
    """Which questions are asked."""
    facts: int = Field(default=10, ge=4)
    """Sentences of a story."""
