"""From the bytes of a sample to pictures, sound and token ids."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from mmctx.datasets.shards.contents import (
    IMAGE_FORMATS,
    Segment,
    complaint,
    media_of,
    parse_json,
    parse_segments,
    read_text,
)
from mmctx.datasets.shards.source import RawSample
from mmctx.errors import SampleError
from mmctx.pack import MediaItem
from mmctx.sample import Sample

try:
    import simplejpeg
except ImportError:  # the extra `jpeg`
    simplejpeg = None

if TYPE_CHECKING:
    from mmctx.tokenizer import TextTokenizer


@torch.autocast("cpu", enabled=False)  # an evaluation in bf16 reads the frames that training reads
def decode_sample(
    raw: RawSample,
    *,
    source: str,
    uid: int,
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    make_image: Callable[[Tensor], MediaItem] | None,
    make_audio: Callable[[Tensor, int], MediaItem] | None,
) -> Sample:
    """Decodes and tokenizes one sample.

    Args:
        raw: bytes of the sample.
        source: name of the source in the config.
        uid: number of the sample.
        texts: the source's texts, such as ``txt`` or ``json:names.zh``.
        tokenizer: turns text into ids.
        make_image: picture (3, H, W) uint8 -> item; None leaves pictures out.
        make_audio: mono clip (n,) float32 and its rate in Hz -> item; None leaves clips out.

    Raises:
        SampleError: the sample cannot be used, for the reasons in `contents.REASONS` or those of the preprocessors.
    """
    document = parse_json(raw.members)
    segments = parse_segments(document, tokenizer.chat)
    media = media_of(raw.members, segments)

    def make(segment: Segment) -> MediaItem | None:
        data = raw.members[segment.value]
        try:
            if segment.kind == "image":
                return make_image(decode_image(data)) if make_image else None
            return make_audio(*decode_audio(data)) if make_audio else None
        except SampleError as error:
            raise SampleError(error.reason, f"{segment.value}: {error.detail}") from None

    if segments is not None:
        return _document(segments, tokenizer, make, Sample(key=raw.key, source=source, uid=uid, facts=_facts(document)))

    ids = tuple(_encode(entry, read_text(entry, raw.members, document), tokenizer) for entry in texts)
    items = {segment.kind: item for segment in media if (item := make(segment)) is not None}
    if not items and all(i is None for i in ids):
        raise SampleError(
            "empty", f"no media and none of the texts {', '.join(texts)}; members: {', '.join(raw.members)}"
        )
    return Sample(
        key=raw.key,
        source=source,
        uid=uid,
        texts=ids,
        image=items.get("image"),
        audio=items.get("audio"),
        facts=_facts(document),
    )


def _facts(document: Any) -> Any:
    """What the json member says beside the document itself."""
    if not isinstance(document, dict):
        return document
    return {name: value for name, value in document.items() if name not in ("segments", "messages")}


def _document(
    segments: Sequence[Segment], tokenizer: TextTokenizer, make: Callable[[Segment], MediaItem | None], sample: Sample
) -> Sample:
    """`sample` with its segments tokenized and decoded. A member that several segments show is decoded, and later encoded, once."""
    texts = _encode_segments(segments, tokenizer)
    shown = {s.value: make(s) for s in segments if s.kind != "text"}
    parts = [(next(texts[s.control]) if s.kind == "text" else shown[s.value], s.learned) for s in segments]
    kept = [
        (part, learned) for part, learned in parts if isinstance(part, MediaItem) or (part is not None and len(part))
    ]
    if not kept:
        raise SampleError("empty", f"{len(segments)} segments hold neither tokens nor media")
    learned = None if all(s.learned for s in segments) else tuple(flag for _, flag in kept)
    return replace(sample, segments=tuple(part for part, _ in kept), learned=learned)


def _encode_segments(segments: Sequence[Segment], tokenizer: TextTokenizer) -> dict[bool, Iterator[np.ndarray]]:
    """Ids of all texts in their order: of those that people wrote, and of those that are a chat template's."""
    kinds = {False: tokenizer.encode_many, True: tokenizer.encode_control}
    return {
        control: iter(encode([s.value for s in segments if s.kind == "text" and s.control is control]))
        for control, encode in kinds.items()
    }


def _encode(entry: str, text: str | None, tokenizer: TextTokenizer) -> np.ndarray | None:
    if text is None:
        return None
    ids = tokenizer.encode(text)
    if not len(ids):
        raise SampleError("empty", f"{entry}: the tokenizer makes 0 tokens of {text[:40]!r}")
    return ids


def decode_image(data: bytes) -> Tensor:
    """A JPEG, PNG or WebP picture as (3, H, W) uint8 RGB, transparency laid over white.

    Pixels are as stored: EXIF rotation is not applied, as in the index. In memory channels may lie last, as decoders write.

    Pillow decodes all of them and decides what is damaged. Where simplejpeg is installed it reads plain JPEGs, to the same
    pixels in about three quarters of the time. torchvision's decoders are deprecated since 0.29, and its PNG decoder crashed the process
    on a damaged file instead of raising.

    Raises:
        SampleError: ``undecodable_image``: damaged, cut short, or beyond Pillow's limit on pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:  # reads the header, checks the limit
            pixels = _quick_pixels(data, image)
            if pixels is None:
                pixels = _pillow_pixels(image)
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise SampleError("undecodable_image", complaint(error)) from None
    if pixels.dtype == torch.uint16:
        pixels = (pixels.int() >> 8).byte()
    if pixels.shape[0] == 1:
        return pixels.expand(3, -1, -1).contiguous()
    return pixels if pixels.shape[0] == 3 else _over_white(pixels)


def _quick_pixels(data: bytes, image: Image.Image) -> Tensor | None:
    """(3, H, W) uint8 of a plain colour JPEG, None for all that Pillow had better look at."""
    if simplejpeg is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)  # strict: even warnings raise
    except ValueError:
        return None


def _pillow_pixels(image: Image.Image) -> Tensor:
    """(1 or 3 or 4, H, W) uint8, or uint16 for pictures of 16 bits."""
    if image.mode.startswith("I;16"):
        return torch.from_numpy(np.asarray(image, dtype=np.uint16).copy())[None]
    wanted = "RGBA" if image.has_transparency_data else "RGB"
    converted = image if image.mode == wanted else image.convert(wanted)  # converting to the same mode would copy
    return torch.from_numpy(np.array(converted)).permute(2, 0, 1)


def _over_white(pixels: Tensor) -> Tensor:
    """(4, H, W) RGBA -> (3, H, W), rounded to the nearest."""
    color, alpha = pixels[:3].int(), pixels[3:].int()
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).byte()


def decode_audio(data: bytes) -> tuple[Tensor, int]:
    """A WAV, FLAC, Ogg or MP3 clip as ((n,) float32 mean of its channels, rate in Hz).

    Raises:
        SampleError: ``undecodable_audio`` where damaged or cut short, ``empty`` without samples, ``bad_audio``
            for NaN or infinite values.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as clip:
            expected, rate = clip.frames, clip.samplerate
            values = clip.read(dtype="float32", always_2d=True)
    except Exception as error:  # libsndfile and its Python side raise many types on damaged bytes
        raise SampleError("undecodable_audio", complaint(error)) from None
    if len(values) != expected:
        raise SampleError("undecodable_audio", f"the header promises {expected} samples, found {len(values)}")
    if not expected:
        raise SampleError("empty", "the clip has 0 samples")
    mono = values.mean(axis=1)
    if not np.isfinite(mono).all():
        raise SampleError("bad_audio", f"{int((~np.isfinite(mono)).sum())} of {len(mono)} samples are NaN or infinite")
    return torch.from_numpy(mono), rate
