"""Users with habits, simulated over the demo's emoji: each history is one document of weekdays, titles and pictures.

    mmctx data build emoji data/emoji
    python examples/recommender/data.py data/emoji data/recommender

A user looks at one item a day for ten weeks and has seven tastes, one for each weekday, drawn from 16 groups of 20 emoji. On a day, the
taste of its weekday decides with a probability of 0.85, else any group does; of a group, popular items come more often (Zipf), and none
comes twice to the same user. Who recommends well has to find the taste of a weekday in the user's own history. `shelves/` are short
documents for pretraining: pictures of one group with their titles behind them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmctx.datasets.build.members import Members, Rendered, encode_json
from mmctx.datasets.build.shards import read_shard, replace_folder
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import DataError

COUNTS = {"shelves": 800, "train": 1500, "heldout": 500}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUM_WEEKS = 10
NUM_GROUPS, GROUP_SIZE = 16, 20
HABIT = 0.85
"""Probability that the weekday's taste decides."""
POPULARITY = 1 / np.arange(1, GROUP_SIZE + 1) ** 0.8
"""Of a group's items, from the first on."""


class Thing(NamedTuple):
    """An item of the catalogue.

    Attributes:
        title: one or two words.
        group: number of its group.
        png: its picture.
    """

    title: str
    group: int
    png: bytes


def read_catalogue(emoji: Path) -> list[Thing]:
    """The items, group by group, the most popular first; from the training shards of the demo.

    Raises:
        DataError: there are too few.
    """
    groups: dict[str, dict[str, bytes]] = {}
    titles: set[str] = set()
    for path in sorted((emoji / "train").glob("*.tar")):
        for sample in read_shard(path):
            title, about = sample["txt"].decode().lower(), json.loads(sample["json"])
            plain = title.isascii() and title.replace(" ", "").isalpha() and len(title.split()) <= 2
            if plain and title not in titles and title.title() not in DAYS:
                titles.add(title)
                groups.setdefault(f"{about['group']}/{about['subgroup']}", {})[title] = sample["png"]
    chosen = sorted(groups, key=lambda name: (-len(groups[name]), name))[:NUM_GROUPS]
    if len(chosen) < NUM_GROUPS or len(groups[chosen[-1]]) < GROUP_SIZE:
        raise DataError(
            f"{emoji}/train: too few emoji for {NUM_GROUPS} groups of {GROUP_SIZE}; build all of them by `mmctx data build emoji`"
        )
    catalogue = []
    for number, name in enumerate(chosen):
        ranked = sorted(groups[name], key=lambda title: hashlib.blake2b(title.encode()).digest())[:GROUP_SIZE]
        catalogue += [Thing(title, number, groups[name][title]) for title in ranked]
    return catalogue


def draw_history(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(numbers of the items, one a day, in order; the group of each weekday)."""
    tastes = rng.permutation(NUM_GROUPS)[: len(DAYS)].tolist()
    left = np.tile(POPULARITY, (NUM_GROUPS, 1))  # of what was not seen
    history = []
    for day in range(NUM_WEEKS * len(DAYS)):
        group = tastes[day % len(DAYS)] if rng.random() < HABIT else int(rng.integers(NUM_GROUPS))
        place = int(rng.choice(GROUP_SIZE, p=left[group] / left[group].sum()))
        left[group, place] = 0
        history.append(group * GROUP_SIZE + place)
    return history, tastes


def write_history(rng: np.random.Generator, catalogue: list[Thing]) -> dict[str, Any]:
    """A document of all days, and its `items` and `tastes`; weekdays are read, titles are learned."""
    history, tastes = draw_history(rng)
    segments: list[dict[str, Any]] = []
    for day, item in enumerate(history):
        segments.append({"text": f"{DAYS[day % len(DAYS)]} : ", "loss": False})
        segments += [{"text": f"{catalogue[item].title} ."}, {"image": item}]
    return {"segments": segments, "items": history, "tastes": tastes}


def write_shelf(rng: np.random.Generator, catalogue: list[Thing]) -> dict[str, Any]:
    """All pictures of a group in any order, each with its title behind it."""
    first = int(rng.integers(NUM_GROUPS)) * GROUP_SIZE
    segments: list[dict[str, Any]] = []
    for item in rng.permutation(np.arange(first, first + GROUP_SIZE)).tolist():
        segments += [{"image": item}, {"text": f"{catalogue[item].title} ."}]
    return {"segments": segments}


def build(emoji: Path, out: Path, counts: dict[str, int] = COUNTS, seed: int = 0) -> dict[str, int]:
    """Writes `shelves/`, `train/`, `heldout/`, `tokenizer/` and `catalogue.json`; returns how many samples there are."""
    catalogue = read_catalogue(emoji)
    titles = [thing.title for thing in catalogue]
    source = Source(
        kind="histories",
        origin=f"seed {seed}",
        recipe=[1, seed, counts, titles],
        items=functools.partial(_items, counts),
        render=functools.partial(_render, catalogue=catalogue, seed=seed),
        total=max(counts.values()),
        splits=tuple(counts),
    )
    answer = build_shards(source, out, BuildOptions())
    (out / "catalogue.json").write_text(json.dumps([[thing.title, thing.group] for thing in catalogue]))
    replace_folder(out / "tokenizer", functools.partial(save_tokenizer, titles=titles))
    return answer["counts"]


def _items(counts: dict[str, int], split: str, start: int) -> Iterator[Item]:
    for number in range(start, counts[split]):
        yield Item(f"{split}-{number:06d}", split=split)


def _render(item: Item, catalogue: list[Thing], seed: int) -> Rendered:
    digest = hashlib.blake2b(f"{seed}\0{item.key}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    document = (write_shelf if item.split == "shelves" else write_history)(rng, catalogue)
    members: Members = {"__key__": item.key}
    for segment in document["segments"]:
        if "image" in segment:
            number = segment["image"]
            segment["image"] = f"{number}.png"
            members[segment["image"]] = catalogue[number].png
    return Rendered({**members, "json": encode_json(document)})


def save_tokenizer(folder: Path, titles: list[str]) -> None:
    """A tokenizer that makes one token of each word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "<|unknown|>", ":", ".", *DAYS, *(word for title in titles for word in title.split())]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # type: ignore[assignment]  # puts spaces between words
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        unk_token="<|unknown|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("emoji", type=Path, help="what `mmctx data build emoji` wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(build(arguments.emoji, arguments.out))
