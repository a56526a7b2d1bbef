"""Pictures and sounds inside a page: data URIs, previews, spectrograms. No torch."""

from __future__ import annotations

import base64
import io

import numpy as np
import soundfile
from PIL import Image

from mmctx.datasets.shards.contents import IMAGE_FORMATS, complaint
from mmctx.errors import MmctxError

MIME_TYPES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "mp3": "audio/mpeg",
}

_PREVIEW_BYTES, _PREVIEW_SIDE = 256 << 10, 768  # larger pictures are shown smaller
_CLIP_BYTES = 4 << 20  # longer clips are not embedded
_PLAYED_RATES = (3_000, 384_000)  # Hz
_HEARD_SECONDS = 120  # of a clip's beginning that a spectrogram shows
_MAX_COLUMNS = 1200
_FLOOR_DB = -80.0

# Anchors of the colour map "magma" (Smith and van der Walt, CC0), dark to bright.
_MAGMA = np.array(
    [[0, 0, 4], [40, 17, 89], [114, 31, 129], [183, 55, 121], [241, 96, 93], [254, 176, 120], [252, 253, 191]]
)


def data_uri(mime_type: str, data: bytes) -> str:
    """`data` inline, so that the page needs no other file."""
    return f"data:{mime_type};base64,{base64.b64encode(data).decode('ascii')}"


def png_uri(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a PNG."""
    return data_uri("image/png", _png(Image.fromarray(pixels)))


def picture_uri(data: bytes, max_pixels: int) -> tuple[str, int, int]:
    """(data URI, width, height) of a picture file; a large one is scaled down for the page.

    Raises:
        MmctxError: it cannot be decoded, or has more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise MmctxError(f"{width} x {height} pixels are too many to show")
            image.load()
            if len(data) <= _PREVIEW_BYTES:
                return data_uri(MIME_TYPES[(image.format or "png").lower()], data), width, height
            image.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
            return data_uri("image/png", _png(image.convert("RGBA"))), width, height
    except MmctxError:
        raise
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise MmctxError(complaint(error)) from None


def clip_uri(extension: str, data: bytes) -> str:
    """A clip's file for a player; empty if it is too large to embed, or of a rate that browsers do not play."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as clip:
            playable = _PLAYED_RATES[0] <= clip.samplerate <= _PLAYED_RATES[1]
    except Exception:  # libsndfile and its Python side raise many types on damaged bytes
        return ""
    suffix = extension.rpartition(".")[2]
    return data_uri(MIME_TYPES[suffix], data) if playable and len(data) <= _CLIP_BYTES else ""


def clip_spectrogram(data: bytes) -> tuple[str, float, int]:
    """(data URI of a spectrogram, seconds, rate in Hz) of a clip's file; of a long one, its first two minutes are drawn.

    Raises:
        MmctxError: it cannot be decoded, or holds values that are not finite.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as clip:
            rate, seconds = clip.samplerate, clip.frames / clip.samplerate
            values = clip.read(min(clip.frames, _HEARD_SECONDS * rate), dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile and its Python side raise many types on damaged bytes
        raise MmctxError(complaint(error)) from None
    if not len(values) or not np.isfinite(values).all():
        raise MmctxError("it holds no samples, or some that are not finite")
    return spectrogram_uri(power_levels(values.mean(axis=1), rate)), seconds, rate


def power_levels(waveform: np.ndarray, rate: int) -> np.ndarray:
    """(n,) -> (F, K) decibels below the loudest, down to -80: windows of 32 ms, at most 1,200 of them."""
    size = max(16, round(0.032 * rate))
    waveform = np.pad(waveform, (0, max(0, size - len(waveform))))
    hop = max(size // 4, (len(waveform) - size) // _MAX_COLUMNS + 1)
    frames = np.lib.stride_tricks.sliding_window_view(waveform, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    levels = 10 * np.log10(np.maximum(power, 1e-20))
    return np.maximum(levels - levels.max(), _FLOOR_DB)


def spectrogram_uri(values: np.ndarray) -> str:
    """`spectrogram_png` as a data URI."""
    return data_uri("image/png", spectrogram_png(values))


def spectrogram_png(values: np.ndarray) -> bytes:
    """Log-mel or other frames (F, M) as a PNG: time to the right, pitch upwards, loud is bright."""
    levels = np.asarray(values, float).T[::-1]  # (M, F)
    levels = (levels - levels.min()) / max(float(np.ptp(levels)), 1e-9)
    anchors = np.linspace(0, 1, len(_MAGMA))
    pixels = np.stack([np.interp(levels, anchors, _MAGMA[:, channel]) for channel in range(3)], axis=-1)  # (M, F, 3)
    return _png(Image.fromarray(pixels.astype(np.uint8)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
