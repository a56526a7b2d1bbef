"""Augmentation of decoded samples, drawn anew each epoch from (seed, epoch, key). Only sources that ask for it get it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field

from mmctx.config import StrictModel
from mmctx.pack import MediaItem
from mmctx.sample import Sample


class SpecAugmentConfig(StrictModel):
    """SpecAugment (Park et al. 2019): bands and stretches of log-mel frames are replaced by the clip's mean."""

    mel_masks: int = Field(default=1, ge=0)
    """Bands of mel bins to hide."""
    mel_width: int = Field(default=12, ge=1)
    """Widest band, in mel bins; each width is drawn from 0 up to this."""
    frame_masks: int = Field(default=2, ge=0)
    """Stretches of time to hide."""
    frame_width: int = Field(default=12, ge=1)
    """Longest stretch, in frames; never more than a fifth of the clip."""


def augment(sample: Sample, config: SpecAugmentConfig, rng: np.random.Generator) -> Sample:
    """The sample with its clips masked; the sample given stays as it is."""

    def masked(part):
        return spec_augment(part, config, rng) if isinstance(part, MediaItem) and part.kind == "audio" else part

    segments = None if sample.segments is None else tuple(masked(part) for part in sample.segments)
    return replace(sample, audio=masked(sample.audio), segments=segments)


def spec_augment(clip: MediaItem, config: SpecAugmentConfig, rng: np.random.Generator) -> MediaItem:
    """A masked copy of a clip of (F, M) frames. torchaudio's masks draw from the global generator, which workers share with nobody."""
    values = clip.values.clone()
    mean = clip.values.mean()
    num_frames, num_mels = values.shape
    for _ in range(config.mel_masks):
        start, width = _span(num_mels, min(config.mel_width, num_mels), rng)
        values[:, start : start + width] = mean
    for _ in range(config.frame_masks):
        start, width = _span(num_frames, min(config.frame_width, num_frames // 5), rng)
        values[start : start + width] = mean
    return replace(clip, values=values)


def _span(size: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, widest + 1))
    return int(rng.integers(0, size - width + 1)), width
