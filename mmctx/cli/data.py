"""Commands about shards: index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmctx.cli.common import Json, print_answer, progress_bars, table


def data_index(
    shards: Annotated[list[str], typer.Argument(help="Paths or urls, with {0000..0099} braces or wildcards.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, to count text tokens too.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Where texts stand: txt, json:names.zh. May be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0 for none besides this one.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Rebuild what looks fresh, too.")] = False,
    remote_cache_dir: Annotated[
        str | None, typer.Option(help="Of remote shards: as data.remote_cache_dir of the run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the sidecar index of each shard, where it is missing or stale."""
    from mmctx.datasets.block_cache import BlockCache
    from mmctx.datasets.index import expand_shards, index_shards
    from mmctx.datasets.source import summarise

    loaded = None
    if tokenizer is not None:
        from mmctx.tokenizer import TextTokenizer

        loaded = TextTokenizer(tokenizer)
    cache = BlockCache.at(remote_cache_dir)
    paths = [path for pattern in shards for path in expand_shards(pattern, cache)]
    with progress_bars() as show:
        texts = tuple(text or ["txt"])
        indexed = index_shards(
            paths, loaded, texts, workers, lambda done, total: show("index", done, total), force=force
        )
    answer = summarise(indexed)
    print_answer(answer, as_json, table(answer))
