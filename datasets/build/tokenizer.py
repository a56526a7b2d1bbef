"""A byte-level BPE tokenizer for whatever texts shards hold, where no pretrained one fits: small sets, many languages, few words."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmctx.datasets.build.bpe import save_bpe, train_bpe
from mmctx.datasets.build.shards import read_shard, replace_folder
from mmctx.datasets.shards.contents import check_texts, parse_json, parse_segments, read_text
from mmctx.datasets.shards.index import expand_shards
from mmctx.errors import ConfigError, DataError, SampleError

SMALLEST = 257  # bytes and the end of text


def build_tokenizer(
    out: Path, shards: Sequence[str], *, texts: Sequence[str] = ("txt",), vocab_size: int = 2048
) -> dict[str, Any]:
    """Trains a tokenizer on the texts of local shards and writes the folder `out`, which `data.tokenizer` of a config may name.

    The same shards give the same tokenizer. Give it the training shards alone: a held-out word is then cut into the pieces that
    training knows.

    Args:
        shards: paths, with braces or wildcards.
        texts: where texts stand, as in `texts` of a source; interleaved documents bring all of theirs.
        vocab_size: entries at most, merges of bytes included.

    Returns:
        A summary: `texts` read, their `characters`, `entries` of the vocabulary, samples that could not be read as `left_out`.

    Raises:
        ConfigError: the vocabulary is smaller than the bytes.
        DataError: a shard is missing, or none holds text.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"vocab_size should be at least {SMALLEST}, the bytes and the end of text, found {vocab_size}"
        )
    texts = check_texts(texts)
    paths = [Path(str(path)) for pattern in shards for path in expand_shards(pattern)]
    found: list[str] = []
    left_out = 0
    for sample in (sample for path in paths for sample in read_shard(path)):
        try:
            found += _texts(sample, texts)
        except SampleError:
            left_out += 1
    if not any(found):
        raise DataError(f"{', '.join(shards)}: {', '.join(texts)} hold no text in any sample")
    tokenizer = train_bpe(found, vocab_size)
    replace_folder(out, functools.partial(save_bpe, tokenizer))
    characters = sum(map(len, found))
    return {
        "texts": len(found),
        "characters": characters,
        "entries": tokenizer.get_vocab_size(),
        "left_out": left_out,
    }


def _texts(sample: dict[str, Any], texts: Sequence[str]) -> Iterator[str]:
    """The declared texts of one sample, or the text segments of an interleaved document."""
    document = parse_json(sample)
    segments = parse_segments(document)
    if segments is not None:
        yield from (segment.value for segment in segments if segment.kind == "text")
        return
    yield from (text for entry in texts if (text := read_text(entry, sample, document)) is not None)
