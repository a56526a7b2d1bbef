"""Held-out samples made worse: pictures with noise, blurred and cropped, sound with noise and too fast, texts with typing errors.

Shapes: S side of the encoder's square input, n samples of a clip.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmctx.datasets.assemble import RunData
from mmctx.datasets.augment.audio import augment_waveform, change_speed
from mmctx.datasets.augment.config import AudioAugmentConfig
from mmctx.datasets.augment.sample import seeded
from mmctx.datasets.decode import decode_sample
from mmctx.datasets.fetch import PackedDataset
from mmctx.datasets.planning.order import derive_key
from mmctx.datasets.planning.table import SourceTable
from mmctx.datasets.shards.contents import parse_json, read_text
from mmctx.pack import MediaItem
from mmctx.sample import Sample, make_uid

CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "image/noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "image/blur": (1, 2, 3, 4, 6),
    "image/crop": (0.9, 0.75, 0.6, 0.4, 0.2),
    "audio/noise": (40, 30, 20, 10, 0),
    "audio/speed": (1.05, 1.1, 1.25, 1.5, 2.0),
    "text/typos": (0.02, 0.05, 0.1, 0.2, 0.3),
}
"""How strong each is at severities 1 to 5. `image/noise`: standard deviation of Gaussian noise, white being 1; `image/blur`: that of a
Gaussian in pixels of a picture 224 wide (both as ImageNet-C, Hendrycks & Dietterich 2019); `image/crop`: share of the area that is left;
`audio/noise`: signal over white noise, dB; `audio/speed`: so many times faster; `text/typos`: share of characters mistyped."""
SEVEREST = 5


def corrupt(data: RunData, name: str, severity: int) -> RunData:
    """The same samples, corrupted: `severity` from 1 to 5, see `CORRUPTIONS`. What is drawn hangs on seed, source and key alone."""
    return replace(data, dataset=CorruptedDataset(data.dataset, name, severity))


class CorruptedDataset(PackedDataset):
    """Another dataset's samples, corrupted before objectives make their documents."""

    def __init__(self, clean: PackedDataset, name: str, severity: int) -> None:
        super().__init__(clean.tables, clean.objectives, clean.tokenizer, clean.seed)
        self.undecodable = clean.undecodable
        self.clean, self.name, self.severity = clean, name, severity
        self.modality, self.level = name.partition("/")[0], CORRUPTIONS[name][severity - 1]

    def with_tables(self, tables: list[SourceTable]) -> CorruptedDataset:  # type: ignore[override]
        """See `PackedDataset`."""
        return CorruptedDataset(self.clean.with_tables(tables), self.name, self.severity)

    def sample(self, source_number: int, sample_id: int) -> Sample:
        """See `PackedDataset`. All severities of a sample draw the same numbers, and curves are smoother for it."""
        table = self.tables[source_number]
        raw = table.source.read(sample_id)
        seed = derive_key(self.seed, "robustness", self.name, table.source.name, raw.key)
        if self.modality == "text":
            document, sample = parse_json(raw.members), self.clean.sample(source_number, sample_id)
            given = [read_text(entry, raw.members, document) for entry in table.config.texts]
            return (
                replace(sample, texts=tuple(self._typed(table, text, seed) for text in given))
                if sample.texts
                else sample
            )
        image, audio = table.preprocessors.image, table.preprocessors.audio

        def make_image(pixels: Tensor) -> MediaItem:
            assert image is not None
            item = image(pixels)
            return replace(item, values=corrupt_picture(item.values, self.name, self.level))

        def make_audio(waveform: Tensor, rate: int) -> MediaItem:
            assert audio is not None
            changed = corrupt_waveform(
                audio.resampled(waveform, rate).values, self.name, self.level, audio.config.sample_rate
            )
            return audio.frames(changed)

        with seeded(seed):
            return decode_sample(
                raw,
                source=table.source.name,
                uid=make_uid(source_number, sample_id),
                texts=table.config.texts,
                tokenizer=self.tokenizer,
                make_image=make_image if image is not None and self.modality == "image" else image,
                make_audio=make_audio if audio is not None and self.modality == "audio" else audio,
            )

    def _typed(self, table: SourceTable, text: str | None, seed: int) -> np.ndarray | None:
        """Ids of a text with errors: of more tokens, mostly, whose end is cut off where the context has no room for them."""
        if text is None:
            return None
        return self.tokenizer.encode(mistype(text, self.level, np.random.default_rng(seed)))[: table.room]


def corrupt_picture(pixels: Tensor, name: str, level: float) -> Tensor:
    """(3, S, S) uint8 -> (3, S, S) uint8. Draws from torch's generator."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    size = pixels.shape[-1]
    if name == "image/noise":
        return functional.gaussian_noise(pixels, sigma=level)
    if name == "image/blur":
        sigma = level * size / 224
        return functional.gaussian_blur(pixels, [2 * int(np.ceil(3 * sigma)) + 1] * 2, [sigma] * 2)
    side = max(round(size * level**0.5), 1)
    top, left = (torch.rand(2) * (size - side + 1)).int().tolist()
    bicubic = InterpolationMode.BICUBIC  # as pictures are made smaller
    return functional.resized_crop(pixels, top, left, side, side, [size, size], bicubic, antialias=True)


def corrupt_waveform(waveform: Tensor, name: str, level: float, rate: int) -> Tensor:
    """(n,) float32 at `rate` Hz -> (n,), or fewer where it is faster. Draws from torch's generator."""
    if name == "audio/speed":
        return change_speed(waveform, level, rate)
    return augment_waveform(waveform, AudioAugmentConfig(noise_snr=(level, level)), rate)


def mistype(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with so many of its characters left out, replaced, typed before another one or swapped with the next (Karpukhin et al.
    2019), each equally often; spaces stay. Other characters come from the text itself, so that it may be in any script.
    """
    letters = [char for char in text if not char.isspace()]
    wrong = rng.random(len(text)) < share
    kinds, others = rng.integers(4, size=len(text)), rng.integers(max(len(letters), 1), size=len(text))
    typed, place = "", 0
    while place < len(text):
        char, following = text[place], text[place + 1 : place + 2].strip()
        if char.isspace() or not wrong[place]:
            typed += char
        elif kinds[place] == 1:
            typed += letters[others[place]]
        elif kinds[place] == 2:
            typed += letters[others[place]] + char
        elif kinds[place] == 3:
            typed += following + char
            place += len(following)
        place += 1
    return typed if typed.strip() else text
