"""Commands about shards: tokenizer, index, check, stats, view."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmctx.cli.common import Json, Overrides, print_answer, progress_bars, table
from mmctx.cli.tables import check_table, stats_tables
from mmctx.errors import ConfigError

if TYPE_CHECKING:
    from mmctx.datasets.remote.storage import Shard
    from mmctx.tokenizer import TextTokenizer
    from mmctx.train.config import RunConfig

YAML = (".yaml", ".yml")


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
    from mmctx.datasets.remote.block_cache import BlockCache
    from mmctx.datasets.shards.index import expand_shards, index_shards
    from mmctx.datasets.shards.summary import summarise

    loaded = _tokenizer(tokenizer)
    cache = BlockCache.at(remote_cache_dir)
    paths = [path for pattern in shards for path in expand_shards(pattern, cache)]
    with progress_bars() as show:
        texts = tuple(text or ["txt"])
        indexed = index_shards(
            paths, loaded, texts, workers, lambda done, total: show("index", done, total), force=force
        )
    answer = summarise(indexed)
    print_answer(answer, as_json, table(answer))


def data_tokenizer(
    out: Annotated[Path, typer.Argument(help="Folder of the tokenizer; what it holds is replaced.")],
    shards: Annotated[list[str], typer.Argument(help="Training shards, with {0000..0099} braces or wildcards.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Where texts stand: txt, json:names.zh. May be repeated.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries at most.")] = 2048,
    as_json: Json = False,
) -> None:
    """Train a small byte-level BPE tokenizer on the texts of shards."""
    from mmctx.datasets.build.tokenizer import build_tokenizer

    answer = build_tokenizer(out, shards, texts=tuple(text or ["txt"]), vocab_size=vocab_size)
    print_answer(answer, as_json, table(answer))


def data_check(
    shards: Annotated[list[str], typer.Argument(help="Shards, or a run's YAML and key=value changes.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, to count tokens.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Where texts stand: txt, json:names.zh. May be repeated.")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens that a text may have.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write samples with errors to this quarantine list.")] = None,
    as_error: Annotated[
        list[str] | None, typer.Option(help="A warning to treat as an error, such as silent_audio. May be repeated.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Pixels that a picture may have.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Seconds that a clip may have.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core by default.")] = None,
    as_json: Json = False,
) -> None:
    """Read and decode all that shards hold and list what is wrong; exit with 1 if any of it is an error."""
    from mmctx.datasets.check.defects import CheckLimits
    from mmctx.datasets.check.source import check_shards, join_results
    from mmctx.datasets.shards.quarantine import write_quarantine

    chosen = {"max_pixels": max_pixels, "max_seconds": max_seconds}
    limits = CheckLimits(**{name: value for name, value in chosen.items() if value is not None})
    results = []
    with progress_bars() as show:
        for name, paths, options in _sources(shards, tokenizer, text, context_length):
            results.append(
                check_shards(
                    paths,
                    **options,
                    limits=limits,
                    strict=as_error or (),
                    num_workers=os.cpu_count() or 1 if workers is None else workers,
                    progress=lambda done, total, name=name: show(f"check {name}", done, total),
                )
            )
    result = join_results(results)
    answer = result.to_json()
    if write is not None:
        answer |= {"quarantined": write_quarantine(write, result.quarantine()), "quarantine": str(write)}
    print_answer(answer, as_json, "" if as_json else check_table(result, answer))
    if not result.ok:
        raise typer.Exit(1)


def data_stats(
    shards: Annotated[list[str], typer.Argument(help="Shards, or a run's YAML and key=value changes.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, to count text tokens too.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Where texts stand: txt, json:names.zh. May be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distributions into this .png, .svg or .pdf.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that index; 0 for none besides this one.")] = 0,
    as_json: Json = False,
) -> None:
    """Show what shards hold, from their indexes alone: sizes, lengths, tokens, problems; of a config, the packing too."""
    from mmctx.datasets.shards.index import index_shards
    from mmctx.datasets.view.stats import source_stats

    config, sizes, forecasted = _config(shards), {}, None
    if config is not None:
        from mmctx import api
        from mmctx.datasets.planning.forecast import forecast
        from mmctx.datasets.planning.plan import Plan

        data = api.build_dataset(config.stages[0].config)
        made = data.dataset.tables[0].preprocessors
        sizes = {"image_tokens": made.image_tokens, "audio_tokens": made.audio_tokens}
        first = config.stages[0]
        forecasted = forecast(Plan(first.config.data, data.tables, config.train.seed), first.stop)
    sources = []
    with progress_bars() as show:
        for name, paths, options in _sources(shards, tokenizer, text, None):
            loaded, texts = options["tokenizer"], options["texts"]
            indexed = index_shards(
                paths, loaded, texts, workers, lambda done, total, name=name: show(f"index {name}", done, total)
            )
            sources.append(source_stats(name, indexed, texts, **sizes))
    if plot is not None:
        from mmctx.datasets.view.stats_plot import plot_stats

        plot_stats(plot, sources, forecasted)
    answer: dict[str, Any] = {"sources": {source.name: source.to_json() for source in sources}}
    answer |= {} if forecasted is None else {"forecast": forecasted}
    answer |= {} if plot is None else {"plot": str(plot)}
    print_answer(answer, as_json, "" if as_json else stats_tables(sources, forecasted))


def data_view(
    target: Annotated[Path, typer.Argument(help="A shard, a run's YAML, or a run folder.")],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="Of a run: the step whose batch is shown, counted from 1.")] = 1,
    start: Annotated[int, typer.Option(help="Of a shard: number of the first sample.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Samples of a shard (50), or documents of each bin (all).")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Of a shard, where texts stand: txt, json:names.zh. May be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("view.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: the samples of a shard, or the packed batch of a run's step."""
    from mmctx.datasets.view.render import write_page

    if target.suffix not in YAML and not target.is_dir():
        from mmctx.datasets.view.shard_page import shard_page

        if overrides:
            raise ConfigError(f"{target} is a shard: {overrides[0]!r} can only change a run's YAML")
        page = shard_page(target, tuple(text or ["txt"]), start, 50 if limit is None else limit)
    else:
        from mmctx.datasets.view.batch_page import batch_page
        from mmctx.train.replay import replay

        batch = replay(target, step, tuple(overrides or ()))
        page = batch_page(target.stem, step, batch.data, batch.bins, batch.batches, limit)
    write_page(out, page)
    answer = {"page": str(out), "bytes": out.stat().st_size}
    print_answer(answer, as_json, table(answer))


def _sources(
    arguments: list[str], tokenizer: Path | None, texts: list[str] | None, context_length: int | None
) -> list[tuple[str, list[Shard], dict[str, Any]]]:
    """(name, shards, texts and tokenizer) of each source: those of a run's config, or one of the shards given."""
    from mmctx.datasets.shards.index import expand_shards

    config = _config(arguments)
    if config is None:
        paths = [path for pattern in arguments for path in expand_shards(pattern)]
        options = {
            "texts": tuple(texts or ["txt"]),
            "tokenizer": _tokenizer(tokenizer),
            "context_length": context_length,
        }
        return [("shards", paths, options)]
    if tokenizer is not None or texts:
        raise ConfigError("the config names its tokenizer and texts: leave out --tokenizer and --text")
    shared = {"tokenizer": _tokenizer(config.data.tokenizer, config.data.bos)}
    shared |= {"context_length": context_length or config.data.context_length}
    held_out = {f"{name} (held out)": source for name, source in config.eval.sources.items()}
    return [
        (name, expand_shards(source.shards, config.data.remote_cache), shared | {"texts": source.texts})
        for name, source in (config.data.sources | held_out).items()
    ]


def _config(arguments: list[str]) -> RunConfig | None:
    """The run's config if the first argument names a YAML file; the others are its overrides then."""
    if Path(arguments[0]).suffix not in YAML:
        return None
    from mmctx import api

    return api.load_config(arguments[0], *arguments[1:])


def _tokenizer(folder: Path | str | None, bos: bool = False) -> TextTokenizer | None:
    if folder is None:
        return None
    from mmctx.tokenizer import TextTokenizer

    return TextTokenizer(folder, bos)
