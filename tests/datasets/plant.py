"""A corpus with every defect that `mmctx data check` knows planted once."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from make_shards import encode_audio, encode_image, make_document, random_clip, random_pixels, write_shard
from PIL import Image

Sample = dict[str, Any]


def plain(key: str, seed: int = 0, **changes: Any) -> Sample:
    """A sound sample of a picture, a clip and a caption; `changes` replace members, None drops them."""
    sample: Sample = {
        "__key__": key,
        "png": encode_image(random_pixels(seed, 8, 12), "PNG"),
        "flac": encode_audio(random_clip(seed, 400), 8000, "FLAC"),
        "txt": f"caption {key}".encode(),
    }
    sample |= {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in sample.items() if value is not None}


def story(key: str, **changes: Any) -> Sample:
    """A sound interleaved document, changed in the same way."""
    sample = make_document(key) | {name.removeprefix("m").replace("_", "."): v for name, v in changes.items()}
    return {name: value for name, value in sample.items() if value is not None}


def segments(*entries: dict[str, str]) -> bytes:
    """The json member of an interleaved document."""
    return json.dumps({"segments": entries}).encode()


def png_of_size(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims any size, its check sums right."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flac_of_length(num_samples: int) -> bytes:
    """A tiny FLAC whose header claims any number of samples (36 bits), 8 kHz mono."""
    data = bytearray(encode_audio(random_clip(0, 400), 8000, "FLAC"))
    assert data[:4] == b"fLaC"
    packed = int.from_bytes(data[18:26], "big")  # rate 20 bits, channels 3, bits 5, samples 36
    data[18:26] = (packed >> 36 << 36 | num_samples).to_bytes(8, "big")
    return bytes(data)


def wav_with_rate(rate: int) -> bytes:
    """A WAV whose header claims any rate."""
    data = bytearray(encode_audio(random_clip(0, 400), 8000, "WAV"))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


def jpeg_on_its_side() -> bytes:
    """A JPEG with EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_image(random_pixels(0, 8, 12), "JPEG", exif=exif.tobytes())


def clipped() -> np.ndarray:
    """A loud sine cut off at full scale; the sine that just reaches it must not count."""
    return np.clip(2.0 * np.sin(np.arange(800) / 10), -1, 1).astype(np.float32)


PLANTED_PLAIN: dict[str, Sample] = {
    "undecodable_image": plain("a00", png=encode_image(random_pixels(1, 64, 64), "PNG")[:-400]),
    "undecodable_audio": plain("a01", flac=b"fLaC nonsense"),
    "bad_json": plain("a02", json=b'{"names": '),
    "bad_text": plain("a03", txt=b"caf\xe9"),
    "bad_audio": plain(
        "a04",
        flac=None,
        wav=encode_audio(np.where(np.arange(400) == 7, np.nan, 0.1).astype(np.float32), 8000, "WAV", "FLOAT"),
    ),
    "empty": plain("a05", txt=b" \n"),
    "duplicate_member": plain("a06", webp=encode_image(random_pixels(1, 8, 8), "WEBP")),
    "oversized_image": plain("a07", png=png_of_size(60_000, 50_000)),
    "oversized_audio": plain("a08", flac=flac_of_length(1 << 35)),
    "absurd_rate": plain("a09", flac=None, wav=wav_with_rate(3)),
    "over_long": plain("a10", txt=b"caption of far too many words " * 40),
    "placeholder_mismatch": plain("a11", txt=b"<|image|> beside <|image|>"),
    "missing_text": plain("a12", txt=None),
    "missing_media": plain("a13", png=None),
    "mixed_layout": plain("a14", cls=b"7"),
    "unread_media": plain("a15", m4a=b"?"),
    "wrong_extension": plain("a16", png=None, jpg=encode_image(random_pixels(1, 8, 8), "PNG")),
    "exif_orientation": plain("a17", png=None, jpg=jpeg_on_its_side()),
    "silent_audio": plain("a18", flac=encode_audio(np.full(400, 1e-5, np.float32), 8000, "FLAC")),
    "clipped_audio": plain("a19", flac=encode_audio(clipped(), 8000, "FLAC")),
    "special_token": plain("a20", txt=b"the end <|endoftext|> of it"),
    "odd_name": plain("a 21"),
}
"""Defect -> the sample of a shard of plain samples that has it and no other."""

PLANTED_STORIES: dict[str, Sample] = {
    "missing_member": story("b00", **{"m0_png": None}),
    "unused_media": story("b01", **{"m9_png": encode_image(random_pixels(5, 8, 8), "PNG")}),
    "placeholder_mismatch": story(
        "b02",
        json=segments({"text": "<|audio|> <|audio|>"}, {"image": "0.png"}, {"audio": "1.flac"}, {"image": "2.jpg"}),
    ),
    "empty": story("b03", json=segments({"text": " "}), **{"m0_png": None, "m1_flac": None, "m2_jpg": None}),
    "bad_json": story("b04", json=segments({"text": "x", "image": "0.png"})),
    "undecodable_image": story("b05", **{"m0_png": b"GIF89a"}),
    "mixed_layout": plain("b06"),
}
"""The same for a shard of interleaved documents."""


def plant(folder: Path) -> set[tuple[str, str, str]]:
    """Writes shards with every defect among sound samples; returns the (shard, key, defect) that a check should find."""
    expected: set[tuple[str, str, str]] = set()

    def add(name: str, found: dict[str, Sample], sound: list[Sample]) -> None:
        write_shard(folder / name, [*sound, *found.values()])
        expected.update((name, sample["__key__"], defect) for defect, sample in found.items())

    add("a.tar", PLANTED_PLAIN, [plain(f"sound-{n}", n) for n in range(30)])
    add("b.tar", PLANTED_STORIES, [story(f"story-{n}") for n in range(10)])
    expected |= _plant_archives(folder)
    return expected


def _plant_archives(folder: Path) -> set[tuple[str, str, str]]:
    """Shards that are damaged as a whole, or whose members are amiss."""
    sound = write_shard(folder / "sound.tar", [plain(f"c{n}", n) for n in range(4)]).read_bytes()
    with tarfile.open(folder / "sound.tar") as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + 512 * -(-members[-1].size // 512)
    prefix = 0

    def rename(data: bytes) -> bytes:
        """The same archive under keys of its own: repeated keys are planted elsewhere."""
        nonlocal prefix
        prefix += 1
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=out, mode="w") as target:
            for member in source.getmembers():
                content = source.extractfile(member)
                member.name = f"d{prefix}-{member.name}"
                target.addfile(member, content)
        return out.getvalue()

    (folder / "truncated.tar").write_bytes(rename(sound)[: members[-1].offset_data + 3])
    (folder / "no_end.tar").write_bytes(rename(sound)[:end])
    damaged = bytearray(rename(sound))
    damaged[members[4].offset + 10] ^= 0xFF
    (folder / "bad_header.tar").write_bytes(bytes(damaged))
    (folder / "compressed.tar").write_bytes(gzip.compress(sound))
    (folder / "trailing_data.tar").write_bytes(rename(sound) + rename(sound))
    (folder / "unreadable.tar").write_bytes(b"")
    (folder / "no_samples.tar").write_bytes(bytes(10_240))
    write_shard(folder / "duplicate_key.tar", [plain("e0"), plain("e1"), plain("e2"), plain("e3")])
    with tarfile.open(folder / "duplicate_key.tar", "a") as tar:  # the caption of e1 does not stand beside its picture
        info = tarfile.TarInfo("e1.txt2")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    write_shard(folder / "repeated_key.tar", [plain("f0"), plain("c2")])
    write_shard(folder / "ignored_member.tar", [plain("g0"), plain("g1")])
    with tarfile.open(folder / "ignored_member.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("._g0.png"), io.BytesIO(b""))
    names = ("truncated", "no_end", "bad_header", "compressed", "trailing_data", "unreadable", "no_samples")
    return {(f"{name}.tar", "", name) for name in (*names, "ignored_member")} | {
        ("duplicate_key.tar", "e1", "duplicate_key"),
        ("sound.tar", "c2", "repeated_key"),
    }
