"""Data that teach a small model to look up and to read what was found: `mmctx data build knowledge OUT`.

``OUT/warmup/`` and ``OUT/read/`` are documents of `mmctx data build recall`: facts, and questions about them. ``OUT/pairs/`` and
``OUT/heldout/`` pair a fact with its question, for a similarity head: a name's code as two texts, a picture with its name.
``OUT/questions.jsonl`` asks for facts that stand in none of them, with two answers each, for the suite `knowledge`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.datasets.build.members import Members, Rendered, encode_json
from mmctx.datasets.build.recall import render_document
from mmctx.datasets.build.recall_words import CODE, KEYS, NAMES, NUM_PICTURES, VALUES, draw_picture, save_tokenizer
from mmctx.datasets.build.shards import replace_folder
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards

RECIPE_VERSION = 1  # raise it when the same arguments begin to give other documents
LENGTHS = {"warmup": 64, "read": 128}
_PICTURES_ASKED = 16


def build_knowledge(
    out: Path, *, documents: int = 4096, pairs: int = 4096, seed: int = 0, options: BuildOptions | None = None
) -> dict[str, Any]:
    """Writes shards, a tokenizer and questions; see `build_shards` for what is returned.

    Args:
        documents: of each kind to read.
        pairs: of a fact and its question.
        seed: everything is drawn from it.
    """
    counts = {"warmup": documents, "read": documents, "pairs": pairs, "heldout": max(1, pairs // 32)}
    source = Source(
        kind="knowledge",
        origin=f"seed {seed}",
        recipe=[RECIPE_VERSION, seed, counts],
        items=functools.partial(_items, counts),
        render=functools.partial(_render, seed=seed),
        total=max(counts.values()),
        splits=tuple(counts),
    )
    answer = build_shards(source, out, options or BuildOptions())
    if not (out / "tokenizer" / "tokenizer.json").is_file():
        replace_folder(out / "tokenizer", save_tokenizer)
    write_questions(out, seed)
    return answer


def write_questions(out: Path, seed: int) -> None:
    """One question a name, every second of them asked, and some pictures."""
    rng = _rng(seed, "questions")
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(NAMES):
        rows.append({"id": f"name-{name}", "question": " ".join([*CODE, name]), "asked": number % 2 == 0})
    (out / "pictures").mkdir(exist_ok=True)
    for number in rng.permutation(NUM_PICTURES)[:_PICTURES_ASKED].tolist():
        (out / "pictures" / f"{number:02d}.png").write_bytes(draw_picture(number))
        rows.append(
            {"id": f"picture-{number:02d}", "question": "", "fact": "{}", "image": f"pictures/{number:02d}.png"}
        )
    for row in rows:
        row["answers"] = rng.permutation(VALUES)[:2].tolist()
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _items(counts: dict[str, int], split: str, start: int) -> Iterator[Item]:
    for number in range(start, counts[split]):
        yield Item(f"{split}-{number:06d}", split=split)


def _render(item: Item, seed: int) -> Rendered:
    rng = _rng(seed, item.key)
    if item.split in LENGTHS:
        return render_document(item.key, LENGTHS[item.split], rng, round_only=item.split == "warmup")
    members: Members = {"__key__": item.key}
    if rng.random() < 0.25:
        number = int(rng.integers(NUM_PICTURES))
        members |= {"png": draw_picture(number), "json": encode_json({"question": KEYS[number]})}
    else:
        asked = [*CODE, str(rng.choice(NAMES))]
        members |= {
            "txt": " ".join([*asked, str(rng.choice(VALUES))]).encode(),
            "json": encode_json({"question": " ".join(asked)}),
        }
    return Rendered(members)


def _rng(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"mmctx knowledge\0{seed}\0{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
