"""Decodes pictures and clips to the end and says what is wrong with them. Imports no torch: check workers start fast.

Sizes are read from the header first: what claims too much is never decoded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
from PIL import Image

from mmctx.datasets.check.defects import CheckLimits
from mmctx.datasets.shards.contents import IMAGE_FORMATS, complaint

_FORMATS = {  # of an extension, as Pillow and libsndfile name them
    "jpg": ("JPEG",),
    "jpeg": ("JPEG",),
    "png": ("PNG",),
    "webp": ("WEBP",),
    "wav": ("WAV", "WAVEX", "RF64"),
    "flac": ("FLAC",),
    "ogg": ("OGG",),
    "mp3": ("MP3", "MPEG"),
}
_ORIENTATION = 0x0112
_BIG = 64 << 20  # decoded bytes from which the ratio to the stored ones counts
_BLOCK_VALUES = 1 << 20
_FULL_SCALE, _RUN = 0.9995, 3
_ONE_LEVEL = 2**-15  # samples that differ by less stand on one level


class MediaDefect(NamedTuple):
    """A word of `check_defects.DEFECTS` and what was found."""

    defect: str
    detail: str


def check_image(file: BinaryIO, num_bytes: int, extension: str, limits: CheckLimits) -> Iterator[MediaDefect]:
    """Yields the defects of a picture of `num_bytes` bytes; decodes it only if its header keeps the limits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about large pictures and odd EXIF: our limits decide
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                too_much = _image_excess(width * height, num_bytes, limits)
                if too_much:
                    yield MediaDefect("oversized_image", f"{extension}: {width} x {height}: {too_much}")
                    return
                yield from _wrong_extension(extension, image.format or "")
                image.load()
                orientation = image.getexif().get(_ORIENTATION, 1)
    except Image.DecompressionBombError as error:  # twice Pillow's limit: it does not even open the file
        yield MediaDefect("oversized_image", f"{extension}: {complaint(error)}")
        return
    except Exception as error:  # Pillow raises many types on damaged bytes
        yield MediaDefect("undecodable_image", f"{extension}: {complaint(error)}")
        return
    if orientation != 1:
        yield MediaDefect("exif_orientation", f"{extension}: orientation {orientation}, pixels are read as stored")


def _image_excess(pixels: int, num_bytes: int, limits: CheckLimits) -> str:
    if pixels > limits.max_pixels:
        return f"{pixels:,} pixels, allowed are {limits.max_pixels:,}"
    return _ratio_excess(3 * pixels, num_bytes, limits)


def _ratio_excess(decoded: int, num_bytes: int, limits: CheckLimits) -> str:
    if decoded > _BIG and decoded > limits.max_ratio * num_bytes:
        return f"{num_bytes:,} bytes decode to {decoded:,}, more than {limits.max_ratio:g} times as many"
    return ""


def _wrong_extension(extension: str, found: str) -> Iterator[MediaDefect]:
    expected = _FORMATS[extension.rpartition(".")[2]]
    if found not in expected:
        yield MediaDefect("wrong_extension", f"{extension}: the content is {found}")


def check_audio(file: BinaryIO, num_bytes: int, extension: str, limits: CheckLimits) -> Iterator[MediaDefect]:
    """Yields the defects of a clip of `num_bytes` bytes; decodes it block by block, if its header keeps the limits."""
    try:
        with soundfile.SoundFile(file) as clip:
            yield from _wrong_extension(extension, clip.format)
            problem = _header_problem(clip, num_bytes, limits)
            if problem is None:
                levels = _measure(clip)
                promised = clip.frames
    except Exception as error:  # libsndfile and its Python side raise many types on damaged bytes
        yield MediaDefect("undecodable_audio", f"{extension}: {complaint(error)}")
        return
    if problem is None:
        problem = levels.problem(promised, limits)
    if problem is not None:
        yield MediaDefect(problem.defect, f"{extension}: {problem.detail}")


def _header_problem(clip: soundfile.SoundFile, num_bytes: int, limits: CheckLimits) -> MediaDefect | None:
    if clip.frames < 1:
        return MediaDefect("empty", "the clip has 0 samples")
    rate = clip.samplerate
    if not limits.min_rate <= rate <= limits.max_rate:
        return MediaDefect(
            "absurd_rate", f"{rate:,} samples a second; allowed are {limits.min_rate:,} to {limits.max_rate:,}"
        )
    seconds = clip.frames / rate
    if seconds > limits.max_seconds:
        return MediaDefect("oversized_audio", f"{seconds:,.0f} s, allowed are {limits.max_seconds:,.0f}")
    excess = _ratio_excess(4 * clip.frames * clip.channels, num_bytes, limits)
    return MediaDefect("oversized_audio", excess) if excess else None


class _Levels(NamedTuple):
    """Of all samples of the clip's mono mean, except `clipped`, which is of the loudest channel."""

    count: int
    not_finite: int
    energy: float
    clipped: int

    def problem(self, promised: int, limits: CheckLimits) -> MediaDefect | None:
        if self.count != promised:
            return MediaDefect("undecodable_audio", f"the header promises {promised} samples, found {self.count}")
        if self.not_finite:
            return MediaDefect("bad_audio", f"{self.not_finite} of {self.count} samples are NaN or infinite")
        rms = (self.energy / self.count) ** 0.5
        if rms < limits.silence:
            return MediaDefect("silent_audio", f"root mean square {rms:.1e}, audible is {limits.silence:.0e} and more")
        if self.clipped >= max(1, limits.clipped * self.count):
            share = self.clipped / self.count
            return MediaDefect("clipped_audio", f"{self.clipped} samples ({share:.1%}) are cut off at full scale")
        return None


def _measure(clip: soundfile.SoundFile) -> _Levels:
    """Decodes the clip in blocks, so that memory does not grow with its length."""
    count = not_finite = clipped = 0
    energy = 0.0
    for block in clip.blocks(max(1, _BLOCK_VALUES // clip.channels), dtype="float32", always_2d=True):
        mono = block.mean(axis=1)
        finite = np.isfinite(mono)
        count += len(block)
        not_finite += int((~finite).sum())
        energy += float(np.square(mono[finite], dtype=np.float64).sum())
        clipped += _clipped_samples(block)
    return _Levels(count, not_finite, energy, clipped)


def _clipped_samples(block: np.ndarray) -> int:
    """How many samples of the worst channel of (n, channels) are cut off: they stand at full scale in runs of one level.

    A sine that just reaches full scale has no such run. Lossy codecs restore clipped peaks to all sorts of values beyond full
    scale; those are not cut off, and reach the model as they are.
    """
    if len(block) < _RUN:
        return 0
    loud = np.abs(block) >= _FULL_SCALE
    level = loud[1:] & loud[:-1] & (np.abs(np.diff(block, axis=0)) < _ONE_LEVEL)  # (n - 1, channels)
    return max(_in_runs(level[:, channel]) for channel in range(block.shape[1]))


def _in_runs(level: np.ndarray) -> int:
    """Samples in runs of three or more, from whether each is level with the next (n - 1,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], level, [False]])))
    lengths = edges[1::2] - edges[::2] + 1
    return int(lengths[lengths >= _RUN].sum())
