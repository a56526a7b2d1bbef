"""Haystacks: what needles are hidden in."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.errors import ConfigError, SampleError
from mmctx.eval.haystack.config import AnyHaystack, NoiseHaystack, TextHaystack
from mmctx.eval.haystack.probe import Part, Speller, size
from mmctx.pack import Document, MediaItem

NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
"""RULER's filler."""


class Haystack(Protocol):
    """Endless units, such as sentences, that needles may stand between."""

    def units(self, rng: np.random.Generator, avoid: Sequence[str]) -> Iterator[Part]:
        """Units in reading order, from a place that `rng` draws; none mentions a name of `avoid` where names can be told from text."""
        ...


class Noise:
    """See `NoiseHaystack`."""

    def units(self, rng: np.random.Generator, avoid: Sequence[str]) -> Iterator[Part]:
        """See `Haystack`."""
        place = int(rng.integers(len(NOISE)))
        while True:
            yield NOISE[place % len(NOISE)]
            place += 1


class Texts:
    """See `TextHaystack`.

    Raises:
        ConfigError: there is no text.
    """

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else sorted([*path.glob("*.txt"), *path.glob("*.txt.gz")])
        self.sentences = [f" {sentence}" for file in files for sentence in sentences(_read(file))]
        if not self.sentences:
            raise ConfigError(
                f"haystack.path: {str(path)!r} holds no text; give a text file, or a folder with *.txt or *.txt.gz files"
            )

    def units(self, rng: np.random.Generator, avoid: Sequence[str]) -> Iterator[Part]:
        """See `Haystack`."""
        place = int(rng.integers(len(self.sentences)))
        while True:
            yield self.sentences[place % len(self.sentences)]
            place += 1


class Samples:
    """Held-out samples; see `SamplesHaystack`. Units are their segments: a picture, a clip, or a text up to the next of them.

    Raises:
        ConfigError: no such source, or none that can be read.
    """

    def __init__(self, data: RunData, sources: Sequence[str], most: int = 256) -> None:
        self._samples = [
            (_units(document), _plain(data.tokenizer.decode(document.input_ids)))
            for *_, documents in read_samples(data, sources, most)
            for document in documents
        ]
        if not self._samples:
            raise ConfigError(
                "haystack: no held-out sample of eval.sources can be read; name others in haystack.sources"
            )

    def units(self, rng: np.random.Generator, avoid: Sequence[str]) -> Iterator[Part]:
        """See `Haystack`."""
        names = [_plain(name) for name in avoid]
        allowed = [units for units, text in self._samples if not any(name in text for name in names)]
        if not allowed:
            yield from Noise().units(rng, avoid)  # every sample gives an answer away
        while True:
            for number in rng.permutation(len(allowed)).tolist():
                yield from allowed[number]


def open_haystack(config: AnyHaystack, data: RunData) -> Haystack:
    """Reads what a haystack is made of, once.

    Args:
        config: which.
        data: held-out samples of captioning alone.
    """
    if isinstance(config, NoiseHaystack):
        return Noise()
    if isinstance(config, TextHaystack):
        return Texts(Path(config.path))
    return Samples(data, config.sources)


def check_haystack(config: AnyHaystack) -> None:
    """Raises ConfigError if the texts are not there."""
    if isinstance(config, TextHaystack):
        Texts(Path(config.path))


def stretch(units: Iterator[Part], room: int, speller: Speller) -> list[np.ndarray | MediaItem]:
    """Units of exactly `room` tokens in all.

    The first is cut at its start, as in any excerpt, so that needles still stand behind whole sentences. Media are never cut: noise takes
    the place of one that does not fit.
    """
    taken: list[np.ndarray | MediaItem] = []
    held = 0
    while held < room:
        taken += speller.encoded([next(units)])
        held += size(taken[-1])
    while taken and held - size(taken[0]) >= room:
        held -= size(taken.pop(0))
    if taken and held > room and isinstance(taken[0], MediaItem):
        held -= size(taken.pop(0))
        padding = stretch(iter(NOISE * (room - held)), room - held, speller)
        return padding + taken
    if taken and held > room:
        taken[0] = taken[0][held - room :]  # type: ignore[index]
    return taken


def sentences(text: str) -> list[str]:
    """A text cut behind full stops, question and exclamation marks; line breaks are spaces."""
    return [part for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if part]


def read_samples(data: RunData, sources: Sequence[str], most: int) -> Iterator[tuple[tuple[int, int], list[Document]]]:
    """`most` samples of each source, evenly spaced, with their place (source, sample) and captioning documents. What cannot be read
    is noted, as everywhere.

    Raises:
        ConfigError: a source's name is unknown.
    """
    names = [table.source.name for table in data.dataset.tables]
    if unknown := sorted(set(sources) - set(names)):
        raise ConfigError(
            f"sources: {unknown[0]!r} is none of eval.sources that captioning reads; there are {', '.join(names)}"
        )
    for number, table in enumerate(data.dataset.tables):
        if sources and names[number] not in sources:
            continue
        count = min(most, table.num_samples)
        for sample_id in (np.arange(count) * table.num_samples // max(count, 1)).tolist():
            try:
                yield (number, sample_id), data.dataset.documents(number, sample_id, 0)
            except SampleError as error:
                if error.reason not in ("missing_member", "over_long"):
                    data.dataset.note(number, sample_id, error)


def _units(document: Document) -> list[np.ndarray | MediaItem]:
    """A document's texts and media in turn, without its end of text."""
    units: list[np.ndarray | MediaItem] = []
    end = 0
    for start, item in document.media:
        units += [document.input_ids[end:start], item]
        end = start + item.num_tokens
    units.append(document.input_ids[end:-1])
    return [unit for unit in units if size(unit)]


def _plain(text: str) -> str:
    """Lower-cased words between single spaces, so that whole names can be looked for."""
    words = re.findall(r"\w+", text.lower())
    return f" {' '.join(words)} "


def _read(file: Path) -> str:
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as opened:
            return opened.read()
    return file.read_text(encoding="utf-8", errors="replace")
