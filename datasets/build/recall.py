"""Documents that prove recall at a given length: `mmctx data build recall OUT`.

For each length L there are ``OUT/train-L/`` and ``OUT/heldout-L/``, drawn from other seeds, and for all of them ``OUT/tokenizer/``.
``OUT/warmup/`` has short documents of facts that go round and round: from them a fresh model learns within a minute to look up
and copy, and is then quick to learn the rest.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.datasets.build.members import Members, Rendered, encode_json
from mmctx.datasets.build.recall_document import write_document, write_round
from mmctx.datasets.build.recall_words import draw_picture, save_tokenizer
from mmctx.datasets.build.shards import replace_folder
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import ConfigError

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RECIPE_VERSION = 1  # raise it when the same arguments begin to give other documents
_SHORTEST = _WARMUP = 64


def build_recall(
    out: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = 1 << 18,
    heldout_tokens: int = 1 << 15,
    picture_tokens: int = 1,
    picture_values: bool = False,
    seed: int = 0,
    options: BuildOptions | None = None,
) -> dict[str, Any]:
    """Writes shards of synthetic documents and their tokenizer; see `build_shards` for what is written and returned.

    Args:
        lengths: of documents, in model tokens: words, picture embeddings and the end-of-text token.
        tokens: of the training documents of each length, in all.
        heldout_tokens: of the held-out ones.
        picture_tokens: embeddings that the model's encoder makes of a picture.
        picture_values: facts of a further kind, whose value is a picture where they are stated, and what it stands for where asked.
        seed: all documents are drawn from it; held-out ones never equal training ones.

    Raises:
        ConfigError: a length is too short, or longer than the tokens that there are to be.
        DataError: `out` holds what another build wrote.
    """
    if not lengths or min(lengths) < _SHORTEST or max(lengths) > min(tokens, heldout_tokens) or picture_tokens < 1:
        raise ConfigError(
            f"lengths should be from {_SHORTEST} up to tokens={tokens} and heldout_tokens={heldout_tokens}, and picture_tokens "
            f"at least 1; found lengths {list(lengths)}, picture_tokens {picture_tokens}"
        )
    counts = {"warmup": (_WARMUP, tokens // 2 // _WARMUP)}
    counts |= {f"train-{length}": (length, tokens // length) for length in lengths}
    counts |= {f"heldout-{length}": (length, heldout_tokens // length) for length in lengths}
    source = Source(
        kind="recall",
        origin=f"seed {seed}",
        recipe=[RECIPE_VERSION, seed, picture_tokens, counts, *["picture values 2"] * picture_values],
        items=functools.partial(_items, counts),
        render=functools.partial(_render, seed=seed, picture_tokens=picture_tokens, picture_values=picture_values),
        total=max(count for _, count in counts.values()),
        splits=tuple(counts),
    )
    answer = build_shards(source, out, options or BuildOptions())
    if not (out / "tokenizer" / "tokenizer.json").is_file():
        replace_folder(out / "tokenizer", save_tokenizer)
    return answer


def _items(counts: dict[str, tuple[int, int]], split: str, start: int) -> Iterator[Item]:
    length, count = counts[split]
    for number in range(start, count):
        yield Item(f"{split}-{number:06d}", length, split=split)


def _render(item: Item, seed: int, picture_tokens: int, picture_values: bool) -> Rendered:
    digest = hashlib.blake2b(f"mmctx recall\0{seed}\0{item.key}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    round_only = item.split == "warmup"
    return render_document(
        item.key, item.payload, rng, picture_tokens, round_only=round_only, picture_values=picture_values
    )


def render_document(
    key: str,
    length: int,
    rng: np.random.Generator,
    picture_tokens: int = 1,
    *,
    round_only: bool = False,
    picture_values: bool = False,
) -> Rendered:
    """The members of a document of `length` tokens; `round_only`: of one to warm up with."""
    if round_only:
        document = write_round(length, rng)
    else:
        document = write_document(length, rng, picture_tokens, picture_values)
    shown = sorted({piece.picture for piece in document.pieces if piece.picture >= 0})
    names = {number: f"{number:02d}.png" for number in shown}
    members: Members = {"__key__": key, "json": encode_json(document.to_json(names))}
    members |= {name: _picture(number) for number, name in names.items()}
    return Rendered(members)


@functools.cache
def _picture(number: int) -> bytes:
    return draw_picture(number)
