"""From whatever holds a picture or a sound to what training read: the same decoders, the same preprocessors.

Shapes: H x W pixels, n samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmctx.datasets.decode import decode_audio, decode_image, to_pixels
from mmctx.errors import DataError, SampleError

_FAR = ("http://", "https://", "data:")


def pixels_of(picture: Any) -> Tensor:
    """(3, H, W) uint8 of a file (path or bytes), a Pillow image, a url, or pixels (H, W, 3) or (3, H, W) uint8.

    Raises:
        DataError: it cannot be read, naming the file.
    """
    if isinstance(picture, str) and picture.startswith(_FAR):
        from transformers.image_utils import load_image

        picture = load_image(picture)
    if isinstance(picture, str | Path | bytes):
        return _read(picture, decode_image, "picture")
    if isinstance(picture, Image.Image):
        return to_pixels(picture)
    if isinstance(picture, Mapping):  # the image column of a Hugging Face dataset
        return pixels_of(picture.get("bytes") or picture.get("path"))
    pixels = torch.as_tensor(np.asarray(picture))
    if pixels.ndim != 3 or pixels.dtype != torch.uint8 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise DataError(
            f"a picture is a file, a Pillow image, or uint8 pixels (3, H, W) or (H, W, 3); found {type(picture).__name__} of "
            f"{tuple(pixels.shape)} {pixels.dtype}"
        )
    return pixels if pixels.shape[0] == 3 else pixels.permute(2, 0, 1)


def samples_of(clip: Any, rate: int | None) -> tuple[Tensor, int]:
    """Mono samples (n,) float32 and their rate in Hz, of a file (path or bytes), of `{"array", "sampling_rate"}`, or of samples (n,).

    Args:
        clip: what holds the sound.
        rate: of samples that do not tell theirs.

    Raises:
        DataError: it cannot be read, naming the file, or samples tell no rate.
    """
    if isinstance(clip, str | Path | bytes):
        return _read(clip, decode_audio, "sound")
    if isinstance(clip, Mapping):
        if "array" not in clip:
            return samples_of(clip.get("bytes") or clip.get("path"), rate)
        clip, rate = clip["array"], clip.get("sampling_rate", rate)
    samples = torch.as_tensor(np.asarray(clip), dtype=torch.float32)
    if samples.ndim != 1:
        raise DataError(
            f"a sound is a file or mono samples (n,); found {tuple(samples.shape)}: take the mean of its channels"
        )
    if rate is None:
        raise DataError("samples tell no rate: give sampling_rate=..., in Hz")
    return samples, rate


def _read(place: str | Path | bytes, decode: Any, what: str) -> Any:
    name = f"{len(place)} bytes" if isinstance(place, bytes) else str(place)
    try:
        return decode(place if isinstance(place, bytes) else Path(place).read_bytes())
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    except SampleError as error:
        raise DataError(f"{name}: no {what} that can be decoded: {error.detail}") from None
