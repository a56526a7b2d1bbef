"""From a waveform to the frames that a sound encoder reads, with sizes that are exact before anything runs.

Shapes: n samples, F frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmctx.encoders.log_mel import AudioEncoderConfig, log_mel
from mmctx.encoders.sound_config import ASTConfig, PretrainedSoundConfig, WhisperConfig
from mmctx.errors import SampleError
from mmctx.pack import MediaItem

KALDI_WINDOW, KALDI_HOP = 0.025, 0.010  # seconds; what AST's feature extractor leaves as torchaudio has it


class FrontEnd(NamedTuple):
    """How a kind of sound encoder is fed.

    Attributes:
        tokens: (n,) int64 numbers of samples at the encoder's rate, all positive, and its config -> (n,) embeddings.
        frames: (n,) waveform at that rate, and the config -> (F, M) float32.
    """

    tokens: Callable[[np.ndarray, Any], np.ndarray]
    frames: Callable[[Tensor, Any], Tensor]


class AudioPreprocessor:
    """Turns a waveform into a `MediaItem` of frames; runs in loader workers, holds only its config."""

    def __init__(self, config: AudioEncoderConfig | PretrainedSoundConfig) -> None:
        self.config = config

    def __call__(self, waveform: Tensor, rate: int) -> MediaItem:
        """Resamples one clip and takes its frames.

        Args:
            waveform: (n,) float, mono, full scale at 1.
            rate: its samples per second.

        Raises:
            SampleError: no samples, samples that are not finite, or not one channel of floats.
        """
        return self.frames(self.resampled(waveform, rate).values)

    def resampled(self, waveform: Tensor, rate: int) -> MediaItem:
        """The first half of `__call__`: its samples at the encoder's rate, to be changed before `frames` takes them."""
        if waveform.ndim != 1 or not waveform.is_floating_point():
            raise SampleError(
                "bad_audio", f"expected (n,) float samples, found {tuple(waveform.shape)} {waveform.dtype}"
            )
        if waveform.numel() == 0:
            raise SampleError("empty", f"no samples (at {rate} Hz)")
        if not torch.isfinite(waveform).all():
            raise SampleError(
                "bad_audio", f"{int((~torch.isfinite(waveform)).sum())} of {len(waveform)} samples not finite"
            )
        samples = resample(waveform.float(), rate, self.config.sample_rate)
        return MediaItem(kind="audio", values=samples, num_tokens=self._tokens(len(samples)))

    def frames(self, samples: Tensor) -> MediaItem:
        """The second half: frames of (n,) samples at the encoder's rate."""
        values = FRONT_ENDS[self.config.kind].frames(samples, self.config)
        return MediaItem(kind="audio", values=values, num_tokens=self._tokens(len(samples)))

    def num_tokens(self, num_samples: np.ndarray, sample_rates: np.ndarray) -> np.ndarray:
        """Embeddings that clips of `num_samples` samples at `sample_rates` Hz become: (n,) and (n,) -> (n,) int64.

        Exact, and from the sizes alone. An empty clip, which `__call__` refuses, counts 0.
        """
        num_samples, sample_rates = np.asarray(num_samples, np.int64), np.asarray(sample_rates, np.int64)
        resampled = -(-num_samples * self.config.sample_rate // sample_rates)
        tokens = FRONT_ENDS[self.config.kind].tokens(np.maximum(resampled, 1), self.config)
        return np.where(num_samples > 0, tokens, 0)

    def _tokens(self, num_samples: int) -> int:
        return int(FRONT_ENDS[self.config.kind].tokens(np.array([num_samples]), self.config)[0])


def resample(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling: (n,) -> (ceil(n * new_rate / rate),).

    The length is set here with integers: torchaudio computes it in float32, which is off by one beyond 2**23 samples.
    """
    if rate == new_rate:
        return waveform
    resampled = _resampler(rate, new_rate)(waveform)
    num_samples = -(-len(waveform) * new_rate // rate)
    return nn.functional.pad(resampled, (0, num_samples - len(resampled)))


def _log_mel_tokens(num_samples: np.ndarray, config: AudioEncoderConfig) -> np.ndarray:
    frames = -(-np.maximum(num_samples, config.n_fft) // config.hop_length)
    return -(-frames // config.frames_per_token)


def _whisper_tokens(num_samples: np.ndarray, config: WhisperConfig) -> np.ndarray:
    return -(-num_samples // (config.hop_length * config.frames_per_token))


def _whisper_frames(samples: Tensor, config: WhisperConfig) -> Tensor:
    """Each chunk's log-mel frames as Whisper's feature extractor makes them of it alone, silence after its end: whole embeddings of it,
    or with `padding: silence` the whole chunk.
    """
    per_token = config.hop_length * config.frames_per_token
    chunk = config.chunk_tokens * per_token
    filled = chunk if config.padding == "silence" else per_token
    samples = nn.functional.pad(samples, (0, -len(samples) % filled))
    return torch.cat([log_mel(part, config)[: len(part) // config.hop_length] for part in samples.split(chunk)])


def _ast_tokens(num_samples: np.ndarray, config: ASTConfig) -> np.ndarray:
    window, hop = _kaldi(config)
    frames = 1 + (np.maximum(num_samples, window) - window) // hop
    steps = 1 + np.maximum(frames - config.patch_size, 0) // config.time_stride
    return -(-steps // config.shuffle)


def _ast_frames(samples: Tensor, config: ASTConfig) -> Tensor:
    """Kaldi's filter banks as AST's feature extractor takes them, zeros after the clip's end, then normalised.

    As there, frames that do not fill a last patch are left out (less than a time step). A step sees a few frames of the next one, so
    chunks overlap: each is laid down with all its frames.
    """
    from torchaudio.compliance.kaldi import fbank

    window, _ = _kaldi(config)
    tokens = int(_ast_tokens(np.array([len(samples)]), config)[0])
    samples = nn.functional.pad(samples, (0, max(window - len(samples), 0)))
    frames = fbank(
        samples[None], sample_frequency=config.sample_rate, window_type="hanning", num_mel_bins=config.num_mels
    )
    full = config.chunk_tokens
    parts = []
    for start in range(0, tokens, full):
        wanted = config.frames_of(full if config.padding == "silence" else min(full, tokens - start))
        part = frames[start * config.frames_per_token :][:wanted]
        parts.append(nn.functional.pad(part, (0, 0, 0, wanted - len(part))))
    return (torch.cat(parts) - config.mean) / (2 * config.std)


def _kaldi(config: ASTConfig) -> tuple[int, int]:
    """Samples of a window, and from one to the next, as Kaldi counts them."""
    return int(config.sample_rate * KALDI_WINDOW), int(config.sample_rate * KALDI_HOP)


FRONT_ENDS: dict[str, FrontEnd] = {
    "logmel": FrontEnd(_log_mel_tokens, log_mel),
    "whisper": FrontEnd(_whisper_tokens, _whisper_frames),
    "ast": FrontEnd(_ast_tokens, _ast_frames),
}


@lru_cache(maxsize=32)
def _resampler(rate: int, new_rate: int) -> nn.Module:
    from torchaudio.transforms import Resample

    return Resample(rate, new_rate)
