"""Decoding against Pillow, soundfile and the planned sizes; damage is an error, never a half-grey picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from make_shards import encode_audio, encode_image, make_document, make_triples, random_clip, random_pixels, write_shard
from PIL import Image

from mmctx.datasets.decode import decode_audio, decode_image, decode_sample
from mmctx.datasets.shards.index import index_shard
from mmctx.datasets.shards.source import RawSample, Source
from mmctx.errors import SampleError
from mmctx.pack import MediaItem

PIXELS = random_pixels(0, 17, 23)
GRAY = PIXELS[..., 0]
RGBA = np.concatenate([PIXELS, random_pixels(1, 17, 23)[..., :1]], axis=2)


def as_array(picture: torch.Tensor) -> np.ndarray:
    assert picture.dtype == torch.uint8
    return picture.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_pictures_come_back_exactly(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(as_array(decode_image(encode_image(PIXELS, format, **options))), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_as_pillow_reads_it(tmp_path, mode):
    data = encode_image(PIXELS, "JPEG", mode)
    (tmp_path / "x.jpg").write_bytes(data)
    expected = np.array(Image.open(tmp_path / "x.jpg").convert("RGB"))
    np.testing.assert_array_equal(as_array(decode_image(data)), expected)


@pytest.fixture(params=["simplejpeg", "Pillow alone"])
def decoders(request, monkeypatch):
    """Both ways to read a JPEG."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr("mmctx.datasets.decode.simplejpeg", None)


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize("quality", [10, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_give_pillows_pixels(tmp_path, quality, subsampling, progressive):
    pixels = np.asarray(Image.fromarray(random_pixels(4, 9, 13)).resize((131, 89)))
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    data = encode_image(pixels, "JPEG", **options)
    (tmp_path / "x.jpg").write_bytes(data)
    np.testing.assert_array_equal(as_array(decode_image(data)), np.array(Image.open(tmp_path / "x.jpg")))


def test_damaged_jpegs_fare_as_with_pillow_alone(monkeypatch):
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    whole = encode_image(np.asarray(Image.fromarray(random_pixels(4, 9, 13)).resize((131, 89))), "JPEG")
    damaged = []
    for _ in range(150):
        data = bytearray(whole)
        for position in rng.integers(2, len(data), 3):
            data[position] = rng.integers(256)
        damaged.append(bytes(data))

    def outcomes():
        for data in damaged:
            try:
                yield as_array(decode_image(data)).tobytes()
            except SampleError as error:
                yield error.reason

    found = list(outcomes())
    monkeypatch.setattr("mmctx.datasets.decode.simplejpeg", None)
    assert found == list(outcomes())
    assert 10 < found.count("undecodable_image") < 140, "the damage should be neither harmless nor fatal throughout"


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_png_modes_become_rgb(mode):
    expected = np.array(Image.fromarray(PIXELS).convert(mode).convert("RGB"))
    np.testing.assert_array_equal(as_array(decode_image(encode_image(PIXELS, "PNG", mode))), expected)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_laid_over_white(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    alpha = RGBA[..., 3:].astype(np.float64) / 255
    expected = np.rint(PIXELS * alpha + 255 * (1 - alpha))
    np.testing.assert_array_equal(as_array(decode_image(encode_image(RGBA, format, **options))), expected)


def test_other_kinds_of_transparency():
    gray_alpha = as_array(decode_image(encode_image(np.zeros((4, 5, 4), np.uint8), "PNG", "LA")))
    np.testing.assert_array_equal(gray_alpha, np.full((4, 5, 3), 255))
    key_color = tuple(int(v) for v in PIXELS[0, 0])
    keyed = as_array(decode_image(encode_image(PIXELS, "PNG", transparency=key_color)))
    np.testing.assert_array_equal(keyed[0, 0], [255] * 3)
    np.testing.assert_array_equal(keyed[1:], PIXELS[1:])
    palette = as_array(decode_image(encode_image(GRAY, "PNG", "P", transparency=int(GRAY[0, 0]))))
    np.testing.assert_array_equal(palette[0, 0], [255] * 3)


def test_sixteen_bits_keep_their_upper_half():
    deep = GRAY.astype(np.uint16) * 256 + 77
    expected = np.repeat(GRAY[..., None], 3, axis=2)
    np.testing.assert_array_equal(as_array(decode_image(encode_image(deep, "PNG"))), expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_picture_is_an_error(format, mode, share):
    data = encode_image(PIXELS, format, mode)
    with pytest.raises(SampleError, match="undecodable_image"):
        decode_image(data[: int(len(data) * share)])


def test_pixel_limit_and_garbage(monkeypatch):
    with pytest.raises(SampleError, match=r"undecodable_image: cannot identify image file$"):
        decode_image(b"no picture")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleError, match=r"undecodable_image: .*exceeds limit"):
        decode_image(encode_image(PIXELS, "PNG"))


@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_sound_is_mixed_to_mono(format):
    left, right = random_clip(0, 500), random_clip(1, 500)
    clip, rate = decode_audio(encode_audio(np.stack([left, right], axis=1), 16000, format))
    assert (clip.dtype, rate) == (torch.float32, 16000)
    np.testing.assert_allclose(clip.numpy(), (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("format", ["OGG", "MP3"])
def test_lossy_sound_has_the_length_of_its_header(format):
    tone = np.sin(np.arange(8000) / 20) / 2
    clip, _ = decode_audio(encode_audio(tone, 16000, format))
    assert len(clip) == 8000
    assert np.corrcoef(clip.numpy(), tone)[0, 1] > 0.99


def test_bad_sound():
    values = random_clip(0, 4000)
    flac = encode_audio(values, 16000, "FLAC")
    with pytest.raises(SampleError, match="undecodable_audio"):
        decode_audio(flac[: len(flac) // 2])
    mp3 = encode_audio(np.sin(np.arange(80_000) / 9), 16000, "MP3")
    with pytest.raises(SampleError, match=r"undecodable_audio: the header promises 80000 samples, found \d+"):
        decode_audio(mp3[: len(mp3) // 2])
    with pytest.raises(SampleError, match=r"undecodable_audio: Format not recognised\."):
        decode_audio(b"no sound")
    with pytest.raises(SampleError, match="empty"):
        decode_audio(encode_audio(values[:0], 16000, "WAV"))
    for wrong in (np.nan, np.inf):
        values[[5, 6]] = wrong
        with pytest.raises(SampleError, match="bad_audio: 2 of 4000 samples"):
            decode_audio(encode_audio(values, 16000, "WAV", "FLOAT"))


def make_image(picture: torch.Tensor) -> MediaItem:
    return MediaItem("image", picture, picture.shape[1] * picture.shape[2])


def make_audio(clip: torch.Tensor, rate: int) -> MediaItem:
    return MediaItem("audio", clip, len(clip))


def decode(raw: RawSample, tokenizer, texts=("txt",)):
    return decode_sample(
        raw, source="s", uid=7, texts=texts, tokenizer=tokenizer, make_image=make_image, make_audio=make_audio
    )


def test_decoded_sizes_are_the_planned_ones(tmp_path, tokenizer):
    texts = ("txt", "json:names.zh", "json:names.fr")
    shard = write_shard(tmp_path / "x.tar", [*make_triples(4), make_document()])
    source = Source("s", [index_shard(shard, tokenizer, texts)], texts)
    sizes = source.sizes(np.arange(5), lambda w, h: w * h, lambda n, rate: n)
    for number in range(4):
        sample = decode(source.read(number), tokenizer, texts)
        assert sample.key == source.locate(number)[1]
        assert (sample.source, sample.uid, sample.segments) == ("s", 7, None)
        assert [-1 if ids is None else len(ids) for ids in sample.texts] == sizes.text_tokens[number].tolist()
        assert sample.image is not None
        assert sample.audio is not None
        assert sample.image.num_tokens == sizes.image_tokens[number]
        assert sample.audio.num_tokens == sizes.audio_tokens[number]
    document = decode(source.read(4), tokenizer, texts)
    assert document.segments is not None
    assert [p.kind if isinstance(p, MediaItem) else tokenizer.decode(p) for p in document.segments] == [
        "first a picture ",
        "image",
        "then a sound ",
        "audio",
        "image",
        "the end",
    ]
    media = [p for p in document.segments if isinstance(p, MediaItem)]
    assert sum(m.num_tokens for m in media if m.kind == "image") == sizes.image_tokens[4]
    assert sum(len(p) for p in document.segments if not isinstance(p, MediaItem)) == sizes.text_tokens[4, 0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"png": b"no picture", "txt": b"t"}, "undecodable_image: png: "),
        ({"wav": b"no sound", "txt": b"t"}, "undecodable_audio: wav: "),
        ({"json": b'{"segments": [{"image": "0.png"}]}'}, "missing_member: image '0.png'; members: json"),
        ({"json": b"[", "txt": b"t"}, "bad_json"),
        ({"txt": b"\xff"}, "bad_text: txt"),
        ({"txt": b" "}, "empty: txt"),
        ({"cls": b"3"}, "empty: no media and none of the texts txt; members: cls"),
        ({"wav": b"", "flac": b""}, "duplicate_member: expected one audio, found wav and flac"),
    ],
)
def test_each_defect_by_its_reason(tokenizer, members, reason):
    with pytest.raises(SampleError) as caught:
        decode(RawSample("k", "x.tar", members), tokenizer)
    assert str(caught.value).startswith(reason)


def test_blank_segments_are_left_out(tokenizer):
    segments = [{"text": ""}, {"text": "a caption"}]
    sample = decode(RawSample("k", "x.tar", {"json": json.dumps({"segments": segments}).encode()}), tokenizer)
    assert sample.segments is not None
    assert len(sample.segments) == 1


def test_texts_without_a_loss_are_marked_and_blank_ones_shift_nothing(tokenizer):
    segments = [
        {"text": "", "loss": False},
        {"text": "a caption", "loss": False},
        {"image": "0.png"},
        {"text": "of"},
        {"image": "0.png"},
    ]
    members = {"json": json.dumps({"segments": segments}).encode(), "0.png": encode_image(PIXELS, "PNG")}
    sample = decode(RawSample("k", "x.tar", members), tokenizer)
    assert sample.segments is not None
    assert sample.learned == (False, True, True, True)
    assert len(sample.segments) == 4
    assert sample.segments[1] is sample.segments[3]  # one picture, shown twice, is encoded once
    members["json"] = members["json"].replace(b"false", b"true")
    assert decode(RawSample("k", "x.tar", members), tokenizer).learned is None


@pytest.mark.parametrize(
    "wrong", [{"text": "a", "loss": 0}, {"text": "a", "loss": None}, {"image": "0.png", "loss": False}]
)
def test_a_loss_that_is_no_truth_value_or_of_a_picture_is_refused(tokenizer, wrong):
    members = {"json": json.dumps({"segments": [{"text": "b"}, wrong]}).encode(), "0.png": encode_image(PIXELS, "PNG")}
    with pytest.raises(SampleError, match="segment 1: loss is true or false and belongs to a text"):
        decode(RawSample("k", "x.tar", members), tokenizer)
