"""Augmentation of samples on their way from the cache to documents, drawn anew each epoch from (seed, epoch, key).

What can be used again is cached: a picture that is cropped is kept as it was decoded, a clip whose waveform is changed as its waveform, and
all else as the encoder will read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmctx.datasets.augment.audio import augment_waveform, mask_frames
from mmctx.datasets.augment.config import AugmentConfig
from mmctx.datasets.augment.image import augment_image
from mmctx.datasets.augment.text import drop_tokens
from mmctx.datasets.planning.table import Preprocessors
from mmctx.objectives.corruption import shuffle_pieces
from mmctx.pack import Document, MediaItem
from mmctx.sample import Sample
from mmctx.tokenizer import TextTokenizer


class Augmentation:
    """What a source does with its samples.

    Args:
        config: what is changed.
        preprocessors: of the model's encoders.
        tokenizer: with the special tokens.

    Attributes:
        raw: whether pictures, and clips, are cached as they were decoded.
    """

    def __init__(self, config: AugmentConfig, preprocessors: Preprocessors, tokenizer: TextTokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.image, self.audio = preprocessors.image, preprocessors.audio
        crops = config.image is not None and config.image.crop is not None
        self.raw = (crops, config.audio is not None and config.audio.changes_waveforms)

    @property
    def makers(self) -> tuple[Callable[[Tensor], MediaItem] | None, Callable[[Tensor, int], MediaItem] | None]:
        """What makes the items that are cached: of decoded pixels, and of a waveform and its rate; None where the model has no encoder."""
        make_image = self.image.keep if self.image is not None and self.raw[0] else self.image
        make_audio = self.audio.resampled if self.audio is not None and self.raw[1] else self.audio
        return make_image, make_audio

    def sample(self, sample: Sample, seed: int) -> Sample:
        """A sample as this epoch shows it; the one from the cache stays as it is. An item that it shows twice is still one."""
        rng = np.random.default_rng(seed)
        media = [part for part in (sample.image, sample.audio, *(sample.segments or ())) if isinstance(part, MediaItem)]
        with seeded(seed):
            made = {id(item): self._item(item) for item in {id(item): item for item in media}.values()}

        def part(given: np.ndarray | MediaItem | None) -> np.ndarray | MediaItem | None:
            return made[id(given)] if isinstance(given, MediaItem) else self._text(given, rng)

        texts = tuple(part(text) for text in sample.texts)
        segments = None if sample.segments is None else tuple(part(segment) for segment in sample.segments)
        return replace(sample, texts=texts, image=part(sample.image), audio=part(sample.audio), segments=segments)  # type: ignore[arg-type]

    def document(self, document: Document, seed: int) -> Document:
        """A document as this epoch shows it."""
        if self.config.text is None:
            return document
        return drop_tokens(document, self.config.text, self.tokenizer, np.random.default_rng(seed))

    def _item(self, item: MediaItem) -> MediaItem:
        return {"image": self._image, "audio": self._audio}[item.kind](item)

    def _image(self, item: MediaItem) -> MediaItem:
        config = self.config.image
        assert self.image is not None
        return (
            item if config is None else self.image(augment_image(item.values, config, self.image.size_of(item.values)))
        )

    def _audio(self, item: MediaItem) -> MediaItem:
        config = self.config.audio
        if config is None:
            return item
        assert self.audio is not None
        if config.changes_waveforms:
            item = self.audio.frames(augment_waveform(item.values, config, self.audio.config.sample_rate))
        return replace(item, values=mask_frames(item.values, config))

    def _text(self, text: np.ndarray | None, rng: np.random.Generator) -> np.ndarray | None:
        config = self.config.text
        return text if config is None or text is None else shuffle_pieces(text, config.pieces, rng)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator of the CPU, from which torchvision and torchaudio draw, seeded; as it was before, afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would seed the GPUs' as well, and with them dropout
        yield
