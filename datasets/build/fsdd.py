"""The Free Spoken Digit Dataset, with its own split: recordings 0 to 4 of each speaker and digit are the test."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmctx.datasets.build.members import LeftOut, Medium, Rendered, plain_sample
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, listed, mix
from mmctx.errors import ConfigError, DataError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TEST = 5

_NAME = re.compile(r"(?:^|/)((\d)_([a-z]+)_(\d+))\.wav$")


def build_fsdd(
    out: Path, archive: Path, *, num_dev: int = 0, shuffled: bool = False, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Shards ``train/`` and ``test/`` of (speech, word), and ``dev/`` with `num_dev`; see `build_shards` for what is written.

    Args:
        archive: the set as a tar, compressed or not, or the folder it unpacks to.
        num_dev: recordings of each speaker and digit, from number 5 on, that are held back from training to choose settings on.
        shuffled: a control: in training, recordings get the words of others. What is held back stays right, and a model that was trained
            on such pairs must be at chance there.

    Raises:
        DataError: it is not there, or holds no recording.
        ConfigError: `num_dev` is negative.
    """
    if num_dev < 0:
        raise ConfigError(f"dev should be at least 0 recordings of each speaker and digit, found {num_dev}")
    if not archive.exists():
        raise DataError(f"{archive}: not found; fetch the Free Spoken Digit Dataset and name its archive or folder")
    items: list[Item] = []
    left_out: list[LeftOut] = []
    for name, medium in _files(archive):
        match = _NAME.search(name)
        if match is None:
            if name.endswith(".wav"):
                left_out.append(LeftOut(name, "bad_name", "expected DIGIT_SPEAKER_NUMBER.wav"))
            continue
        key, digit, speaker, number = match[1], int(match[2]), match[3], int(match[4])
        split = "test" if number < NUM_TEST else "dev" if number < NUM_TEST + num_dev else "train"
        items.append(Item(key, (medium, digit, speaker, number), split=split))
    if not items:
        raise DataError(f"{archive}: holds no recording named DIGIT_SPEAKER_NUMBER.wav")
    items = mix(items)
    source = Source(
        kind="fsdd",
        origin=str(archive.absolute()),
        recipe=[stamp([archive]), num_dev, shuffled] if num_dev or shuffled else stamp([archive]),
        items=listed(_shuffle_words(items) if shuffled else items),
        render=_render,
        total=len(items),
        splits=("train", "dev", "test") if num_dev else ("train", "test"),
        left_out=left_out,
    )
    return build_shards(source, out, options or BuildOptions())


def _shuffle_words(items: Sequence[Item]) -> list[Item]:
    """Each training item gets the digit of the one before it; the first, that of the last."""
    digits = [item.payload[1] for item in items if item.split == "train"]
    given = iter(digits[-1:] + digits[:-1])
    return [
        replace(item, payload=(item.payload[0], next(given), *item.payload[2:])) if item.split == "train" else item
        for item in items
    ]


def _files(archive: Path) -> Iterator[tuple[str, Medium]]:
    """All files; those of an archive are read now, because a compressed one gives no access to the middle."""
    if archive.is_dir():
        for path in sorted(archive.rglob("*.wav")):
            yield path.name, Medium("audio", path.name, path=str(path))
        return
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, Medium("audio", member.name, data=file.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: no readable tar archive ({error}); fetch it again") from None


def _render(item: Item) -> Rendered:
    medium, digit, speaker, number = item.payload
    facts = {"digit": digit, "speaker": speaker, "number": number}
    return plain_sample(item.key, [medium], WORDS[digit], facts)
