"""Sound, augmented by torchaudio: waveforms before their log-mel frames, then the frames.

Shapes: n samples, F frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.datasets.augment.config import AudioAugmentConfig


def augment_waveform(waveform: Tensor, config: AudioAugmentConfig, rate: int) -> Tensor:
    """(n,) float32 at `rate` Hz -> (n,): another speed, noise. Draws from torch's generator."""
    from torchaudio.functional import add_noise

    speed = config.speeds[int(torch.randint(len(config.speeds), ()))]
    if speed != 1.0:
        waveform = _of_length(change_speed(waveform, speed, rate), len(waveform))
    if config.noise_snr is not None:
        low, high = config.noise_snr
        waveform = add_noise(waveform, torch.randn_like(waveform), low + (high - low) * torch.rand(()))
    return waveform


def change_speed(waveform: Tensor, speed: float, rate: int) -> Tensor:
    """(n,) float32 at `rate` Hz, played so many times faster, which raises its pitch as well -> (about n / speed,)."""
    with one_thread():
        return _speed(rate, speed)(waveform)[0]


def mask_frames(frames: Tensor, config: AudioAugmentConfig) -> Tensor:
    """(F, M) log-mel frames, bands and stretches of which are replaced by the clip's mean. Draws from torch's generator."""
    from torchaudio.functional import mask_along_axis

    num_frames, num_mels = frames.shape
    mean = float(frames.mean())
    widest = [min(config.frame_width, num_frames // 5), min(config.mel_width, num_mels)]
    for axis in [1] * config.mel_masks + [0] * config.frame_masks:
        frames = mask_along_axis(frames, widest[axis] + 1, mean, axis)  # it draws widths below the number it is given
    return frames


def _of_length(waveform: Tensor, length: int) -> Tensor:
    """Cut or padded with silence at random sides: the plan has promised how long it is."""
    over = len(waveform) - length
    place = int(torch.randint(abs(over) + 1, ()))
    if over >= 0:
        return waveform[place : place + length]
    return nn.functional.pad(waveform, (place, -over - place))


@contextmanager
def one_thread() -> Iterator[None]:
    """Some convolutions sum in another order on several threads, and a loader worker has one: bits must not depend on who loads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=32)
def _speed(rate: int, factor: float) -> Any:
    from torchaudio.transforms import Speed

    return Speed(rate, factor + 1e-9)  # it rounds the new rate down: 1.13 times 16,000 must be 18,080
