"""Log-mel frames, and the config of the sound encoder that is trained on them from scratch.

Shapes: n samples, F frames, M mel bins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmctx.config import StrictModel
from mmctx.encoders.projector import ProjectorKind


class AudioEncoderConfig(StrictModel):
    """A sound encoder: log-mel frames, convolutions of stride 2, a small transformer, a projector."""

    kind: Literal["logmel"] = "logmel"
    sample_rate: int = Field(default=16_000, ge=1)
    """Samples per second that clips are resampled to."""
    n_fft: int = Field(default=400, ge=2)
    """Window of the Fourier transform, samples; shorter clips are padded with silence."""
    hop_length: int = Field(default=160, ge=1)
    """Samples from one frame to the next."""
    num_mels: int = Field(default=80, ge=1)
    """M: mel bins per frame."""
    stride: int = Field(default=8, ge=2)
    """Frames per position of the sound transformer: a power of two, one convolution of stride 2 for each doubling."""
    shuffle: int = Field(default=1, ge=1)
    """r: neighbouring positions that are merged into one embedding behind the transformer, the pixel shuffle of sound."""
    width: int = Field(default=384, ge=2)
    """Channels of the convolutions and of the transformer; even."""
    depth: int = Field(default=4, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=6, ge=1)
    """Attention heads; they divide `width`."""
    chunk_seconds: float = Field(default=30.0, gt=0)
    """Longer clips are encoded in chunks of this length, each blind to the others."""
    projector: ProjectorKind = "mlp"
    """How features become embeddings: `linear` or two layers (`mlp`)."""

    @model_validator(mode="after")
    def _check(self) -> AudioEncoderConfig:
        if self.stride & (self.stride - 1):
            raise ValueError(f"stride {self.stride} is not a power of two")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd: the sinusoidal positions need sine and cosine pairs")
        if self.chunk_frames < self.frames_per_token:
            raise ValueError(
                f"chunk_seconds {self.chunk_seconds} is shorter than one embedding: {self.frames_per_token} frames of "
                f"{self.hop_length} samples"
            )
        return self

    @property
    def chunk_frames(self) -> int:
        """Frames of a full chunk: a multiple of `frames_per_token`, so cutting a clip adds no embedding."""
        frames = round(self.chunk_seconds * self.sample_rate) // self.hop_length
        return frames - frames % self.frames_per_token

    @property
    def frames_per_token(self) -> int:
        """Frames that become one embedding."""
        return self.stride * self.shuffle

    @property
    def chunk_tokens(self) -> int:
        """Embeddings of a full chunk."""
        return self.chunk_frames // self.frames_per_token


class LogMelSizes(Protocol):
    """What `log_mel` reads of a config."""

    @property
    def sample_rate(self) -> int: ...
    @property
    def n_fft(self) -> int: ...
    @property
    def hop_length(self) -> int: ...
    @property
    def num_mels(self) -> int: ...


def log_mel(waveform: Tensor, config: LogMelSizes) -> Tensor:
    """Log-mel frames as Whisper makes them: (n,) -> (F, M) float32, F = ceil(max(n, n_fft) / hop_length).

    Frame t is centred on sample t * hop_length. Values are log10 of the power, floored at 8 below the clip's
    own maximum, then (x + 4) / 4: about -1..1.5, and independent of every other clip.
    """
    waveform = nn.functional.pad(waveform, (0, max(config.n_fft - len(waveform), 0)))
    num_frames = -(-len(waveform) // config.hop_length)  # 30 s are 3000 frames, as in Whisper, not 3001
    transform = _mel_transform(config.sample_rate, config.n_fft, config.hop_length, config.num_mels)
    frames = transform(waveform)[:, :num_frames].T  # (F, M)
    frames = frames.clamp(min=1e-10).log10()
    frames = torch.maximum(frames, frames.max() - 8)
    return ((frames + 4) / 4).contiguous()


@lru_cache(maxsize=8)
def _mel_transform(sample_rate: int, n_fft: int, hop_length: int, num_mels: int) -> nn.Module:
    from torchaudio.transforms import MelSpectrogram

    return MelSpectrogram(
        sample_rate=sample_rate, n_fft=n_fft, hop_length=hop_length, n_mels=num_mels, norm="slaney", mel_scale="slaney"
    )
