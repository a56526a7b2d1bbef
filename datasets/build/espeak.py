"""Speech of any text through espeak-ng, by ctypes: text and voice in, a waveform at 16 kHz out.

The library carries phases and flutter from one utterance to the next, so the same text never sounds twice the same. A
clip must depend on nothing but its text and voice (whatever process makes it, whenever), so each call loads the library
afresh: 0.6 ms beside some 20 ms of synthesis. Linux and macOS only.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

from mmctx.datasets.build.catalogue import demo_package
from mmctx.errors import DataError

SAMPLE_RATE = 16_000
_NATIVE_RATE = 22_050
_UP, _DOWN = 320, 441  # 16,000 / 22,050 in lowest terms
# Constants of speak_lib.h. With AUDIO_OUTPUT_RETRIEVAL (1) a thread speaks instead, and stopping that thread can hang.
_OUTPUT_SYNCHRONOUS, _CHARS_UTF8, _PARAMETER_RATE, _PARAMETER_PITCH = 2, 1, 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """An espeak-ng voice with an optional ``+variant``; ``rate`` in words a minute, ``pitch`` from 0 to 100."""

    name: str
    rate: int
    pitch: int = 50


VOICES = (
    Voice("en-us", 165),
    Voice("en-us+f4", 175, 55),
    Voice("en-us+m5", 150, 35),
    Voice("en-us-nyc", 180),
    Voice("en-us+linda", 170, 60),
    Voice("en", 160),
    Voice("en+m3", 145, 40),
    Voice("en+steph", 185, 50),
    Voice("en-gb-scotland", 170),
    Voice("en-gb-scotland+m7", 155, 45),
    Voice("en-gb-x-rp+f1", 165, 60),
    Voice("en-gb-x-gbclan+f4", 180, 50),
    Voice("en-gb-x-gbcwmd", 160, 45),
    Voice("en-029", 165, 55),
)


def speak(text: str, voice: Voice) -> np.ndarray:
    """Speech of ``text``: float32 ``(samples,)`` in [-1, 1] at 16 kHz, silence at both ends cut to 20 ms.

    Raises:
        DataError: espeakng-loader is missing, the voice is unknown or nothing was spoken.
    """
    loud = synthesize(text, voice).astype(np.float32) / 32_768
    loud = trim(resample(loud))
    if not loud.size:
        raise DataError(f"espeak-ng: voice {voice.name!r} said nothing for {text!r}; change the text or the voice")
    return loud


def synthesize(text: str, voice: Voice) -> np.ndarray:
    """The raw output of espeak-ng: int16 ``(samples,)`` at 22,050 Hz, a function of its arguments alone."""
    loader = demo_package("espeakng_loader")
    chunks: list[bytes] = []

    @_CALLBACK
    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    library = ctypes.CDLL(loader.get_library_path())
    try:
        rate = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, loader.get_data_path().encode(), 0)
        if rate != _NATIVE_RATE:
            raise DataError(f"espeak-ng: {rate} at the start, not {_NATIVE_RATE} Hz; reinstall espeakng-loader")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breath and Klatt voices draw random numbers
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
            raise DataError(f"espeak-ng: no voice {voice.name!r}; see VOICES in mmctx.datasets.build.espeak")
        library.espeak_SetParameter(_PARAMETER_RATE, voice.rate, 0)
        library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0)
        encoded = text.encode() + b"\0"
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 0, 0, _CHARS_UTF8, None, None)
    finally:
        library.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    return np.frombuffer(b"".join(chunks), dtype=np.int16)


def resample(wave: np.ndarray) -> np.ndarray:
    """22,050 Hz to 16,000 Hz by a polyphase windowed sinc; float32 ``(n,)`` -> ``(ceil(n * 320 / 441),)``.

    Plain numpy, because worker processes should not have to import torch for it.
    """
    bank = _filter_bank()
    half = bank.shape[1] // 2
    position = np.arange(-(-len(wave) * _UP // _DOWN)) * _DOWN  # in 1/320 of an input sample
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(wave, (half - 1, half + 1)), bank.shape[1])
    return np.einsum("nk,nk->n", windows[position // _UP], bank[position % _UP])


def trim(wave: np.ndarray, threshold: float = 0.01, margin: int = SAMPLE_RATE // 50) -> np.ndarray:
    """Cuts what is below ``threshold`` of the peak off both ends, but for ``margin`` samples; silence gives nothing."""
    level = np.abs(wave)
    loud = np.flatnonzero(level > threshold * level.max(initial=0.0))
    return wave[max(loud[0] - margin, 0) : loud[-1] + 1 + margin] if loud.size else wave[:0]


@cache
def _filter_bank(zero_crossings: int = 16, rolloff: float = 0.94) -> np.ndarray:
    """``(320, taps)``: a low-pass filter for each place an output sample can have between two input samples."""
    cutoff = rolloff * _UP / _DOWN
    half = int(np.ceil(zero_crossings / cutoff))
    offset = np.arange(1 - half, half + 1)[None, :] - np.arange(_UP)[:, None] / _UP
    window = np.where(np.abs(offset) < half, np.cos(np.pi * offset / (2 * half)) ** 2, 0)
    return (cutoff * np.sinc(cutoff * offset) * window).astype(np.float32)
