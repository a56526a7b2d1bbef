"""`mmctx data build`: shards from what users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmctx.cli.common import Json, print_answer, progress_bars, table
from mmctx.errors import MmctxError

Out = Annotated[Path, typer.Argument(help="Folder of the shards.")]
Workers = Annotated[
    int | None, typer.Option(help="Processes; by default one a core where media are drawn or converted.")
]
Heldout = Annotated[float, typer.Option(help="Share of the samples that goes to heldout/, by a hash of their keys.")]
PerShard = Annotated[int, typer.Option(help="Most samples of a shard.")]
ShardMb = Annotated[int, typer.Option(help="Most MiB of a shard.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of pictures: paths, bytes, or a list of them.")]
AudioColumn = Annotated[str | None, typer.Option(help="Column of clips, likewise.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text.")]
KeyColumn = Annotated[str | None, typer.Option(help="Column that names the samples; row numbers by default.")]
EmojiLimit = Annotated[int | None, typer.Option(help="Only so many emoji, for a quick look.")]
GroupColumn = Annotated[str | None, typer.Option(help="Rows with the same value here are held out together.")]


class Kinds(TyperGroup):
    """A group whose unknown commands are errors like all others of ours."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise MmctxError(f"{ctx.command_path} knows {', '.join(self.list_commands(ctx))}, not {args[0]!r}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Kinds,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make WebDataset shards. OUT gets train/, heldout/, build.json and left_out.jsonl; what is whole is not made again.",
)


def run(
    build: Callable[..., dict[str, Any]], as_json: bool, limits: tuple[float, int, int, int | None], **arguments: Any
) -> None:
    """Calls a builder with limits (held-out share, samples, MiB, workers) and prints its answer."""
    from mmctx.datasets.build.writer import BuildOptions

    heldout, samples, size, workers = limits
    with progress_bars() as show:
        options = BuildOptions(
            heldout=heldout, samples_per_shard=samples, shard_mb=size, num_workers=workers, progress=show
        )
        answer = build(**arguments, options=options)
    short = {name: len(value) if isinstance(value, list) else value for name, value in answer.items()}
    print_answer(answer, as_json, table(short))


@app.command()
def emoji(
    out: Out,
    seed: Annotated[int, typer.Option(help="Voices and books are drawn from it.")] = 0,
    limit: EmojiLimit = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The demo: pictures, speech and text, made from pip packages on this machine."""
    from mmctx.datasets.build.emoji import build_emoji

    with progress_bars() as show:
        answer = build_emoji(out, seed=seed, limit=limit, num_workers=workers, progress=show)
    print_answer(answer, as_json, table(answer))


@app.command("emoji-names")
def emoji_names(
    out: Out,
    language: Annotated[list[str], typer.Option(help="Such as fr; may be repeated.")],
    image_size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 128,
    limit: EmojiLimit = None,
    shuffled: Annotated[bool, typer.Option("--shuffled", help="A control: names of other emoji.")] = False,
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Pictures of emoji with their names in several languages, without speech."""
    from mmctx.datasets.build.emoji_names import build_emoji_names

    limits = (heldout, per_shard, shard_mb, workers)
    arguments = {"languages": language, "image_size": image_size, "limit": limit, "shuffled": shuffled}
    run(build_emoji_names, as_json, limits, out=out, **arguments)


@app.command()
def folder(
    out: Out,
    source: Annotated[Path, typer.Argument(help="Folder of pictures, clips and captions.")],
    text_column: TextColumn = None,
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Media files with captions beside them (dog.jpg, dog.wav, dog.txt) or in captions.csv, metadata.jsonl and so on."""
    from mmctx.datasets.build.folder import build_folder

    limits = (heldout, per_shard, shard_mb, workers)
    run(build_folder, as_json, limits, folder=source, out=out, text_column=text_column)


@app.command("table")
def from_table(
    out: Out,
    sources: Annotated[list[Path], typer.Argument(help="JSON-lines, CSV, TSV or Parquet files, or folders of them.")],
    image_column: ImageColumn = None,
    audio_column: AudioColumn = None,
    text_column: TextColumn = None,
    key_column: KeyColumn = None,
    group_column: GroupColumn = None,
    media_root: Annotated[Path | None, typer.Option(help="Folder that paths are relative to; the table's own.")] = None,
    quotes: Annotated[bool, typer.Option(help="Cells of CSV and TSV files may stand in quotes.")] = True,
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Tables whose columns hold texts and media; other columns go into the json member."""
    from mmctx.datasets.build.table import Columns, build_table

    chosen = Columns(image_column, audio_column, text_column, key_column, group_column)
    limits = (heldout, per_shard, shard_mb, workers)
    arguments = {"chosen": chosen, "media_root": media_root, "quotes": quotes}
    run(build_table, as_json, limits, sources=sources, out=out, **arguments)


@app.command()
def chat(
    out: Out,
    sources: Annotated[list[Path], typer.Argument(help="JSON-lines files with `messages`, or folders of them.")],
    key_column: KeyColumn = None,
    group_column: GroupColumn = None,
    media_root: Annotated[Path | None, typer.Option(help="Folder that paths are relative to; the file's own.")] = None,
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Conversations: messages with role and content, which may name pictures and sounds."""
    from mmctx.datasets.build.chat import build_chat

    limits = (heldout, per_shard, shard_mb, workers)
    arguments = {"media_root": media_root, "key": key_column, "group": group_column}
    run(build_chat, as_json, limits, sources=sources, out=out, **arguments)


@app.command()
def hf(
    out: Out,
    source: Annotated[Path, typer.Argument(help="A save_to_disk folder, or a folder of Parquet files.")],
    image_column: ImageColumn = None,
    audio_column: AudioColumn = None,
    text_column: TextColumn = None,
    key_column: KeyColumn = None,
    group_column: GroupColumn = None,
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """A dataset of the Hugging Face library on the disk, in its own splits."""
    from mmctx.datasets.build.hf import build_hf
    from mmctx.datasets.build.table import Columns

    chosen = Columns(image_column, audio_column, text_column, key_column, group_column)
    run(build_hf, as_json, (heldout, per_shard, shard_mb, workers), folder=source, out=out, chosen=chosen)


@app.command()
def text(
    out: Out,
    sources: Annotated[list[Path], typer.Argument(help="Text, Markdown or HTML files, or folders of them.")],
    cut: Annotated[str, typer.Option(help="file, form-feed or heading: what becomes a document.")] = "file",
    encoding: Annotated[str, typer.Option(help="Encoding of the files.")] = "utf-8",
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Long texts, one document a file or a part of it."""
    from mmctx.datasets.build.text import build_text

    limits = (heldout, per_shard, shard_mb, workers)
    run(build_text, as_json, limits, sources=sources, out=out, cut=cut, encoding=encoding)


@app.command()
def stamps(
    out: Out,
    source: Annotated[Path | None, typer.Option("--from", help="Folder of the stamps, if not the package's.")] = None,
    view: Annotated[str, typer.Option(help="spoken: picture, caption, speech; captioned; sounding.")] = "spoken",
    language: Annotated[
        list[str] | None, typer.Option(help="Such as fr or zh_CN; may be repeated. All by default.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Width of stamps drawn from SVG, in pixels.")] = 256,
    shuffled: Annotated[
        bool,
        typer.Option("--shuffled", help="A control: training captions of other stamps; what is held out stays right."),
    ] = False,
    heldout: Heldout = 0.1,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Tux Paint's stamps (apt-get install tuxpaint-stamps-default), captioned and spoken in many languages."""
    from mmctx.datasets.build.stamps import FOLDER, build_stamps

    limits = (heldout, per_shard, shard_mb, workers)
    arguments = {"view": view, "languages": language or (), "image_size": image_size, "shuffled": shuffled}
    run(build_stamps, as_json, limits, out=out, folder=source or FOLDER, **arguments)


@app.command()
def asterisk(
    out: Out,
    source: Annotated[Path | None, typer.Option("--from", help="Folder of the prompts, if not the package's.")] = None,
    transcripts: Annotated[Path | None, typer.Option(help="Their transcripts, if not the package's.")] = None,
    heldout: Heldout = 0.1,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Asterisk's spoken prompts (apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav)."""
    from mmctx.datasets.build.asterisk import FOLDER, TRANSCRIPTS, build_asterisk

    limits = (heldout, per_shard, shard_mb, workers)
    folder, lines = source or FOLDER, transcripts or TRANSCRIPTS
    run(build_asterisk, as_json, limits, out=out, folder=folder, transcripts=lines)


@app.command()
def gimp(
    out: Out,
    source: Annotated[Path | None, typer.Option("--from", help="Folder of the pages, if not the package's.")] = None,
    unit: Annotated[str, typer.Option(help="page or chapter: what becomes a document.")] = "page",
    heldout: Heldout = 0.1,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The GIMP manual (apt-get install gimp-help-en) as interleaved documents."""
    from mmctx.datasets.build.gimp import FOLDER, build_gimp

    limits = (heldout, per_shard, shard_mb, workers)
    run(build_gimp, as_json, limits, out=out, folder=source or FOLDER, unit=unit)


@app.command()
def recall(
    out: Out,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a document; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Training tokens of each length.")] = 1 << 18,
    heldout_tokens: Annotated[int, typer.Option(help="Held-out tokens of each length.")] = 1 << 15,
    picture_tokens: Annotated[int, typer.Option(help="Embeddings that the model makes of a picture.")] = 1,
    picture_values: Annotated[
        bool,
        typer.Option("--picture-values", help="Further facts, whose value is shown as a picture and asked in words."),
    ] = False,
    seed: Annotated[int, typer.Option(help="All documents are drawn from it.")] = 0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Synthetic documents of facts and questions, in text and pictures, that prove recall at exact lengths; with a tokenizer."""
    from mmctx.datasets.build.recall import LENGTHS, build_recall

    sizes = {"tokens": tokens, "heldout_tokens": heldout_tokens, "picture_tokens": picture_tokens, "seed": seed}
    sizes["picture_values"] = picture_values
    run(build_recall, as_json, (0.0, per_shard, shard_mb, workers), out=out, lengths=length or LENGTHS, **sizes)


@app.command()
def knowledge(
    out: Out,
    documents: Annotated[int, typer.Option(help="Documents to learn reading from, of each kind.")] = 4096,
    pairs: Annotated[int, typer.Option(help="Facts with their questions, to learn looking up from.")] = 4096,
    seed: Annotated[int, typer.Option(help="Everything is drawn from it.")] = 0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Synthetic facts and questions for a model that answers from a store; with a tokenizer and the questions of suite knowledge."""
    from mmctx.datasets.build.knowledge import build_knowledge

    run(
        build_knowledge,
        as_json,
        (0.0, per_shard, shard_mb, workers),
        out=out,
        documents=documents,
        pairs=pairs,
        seed=seed,
    )


@app.command()
def fsdd(
    out: Out,
    source: Annotated[Path, typer.Argument(help="fsdd.tar.gz, or the folder it unpacks to.")],
    dev: Annotated[
        int, typer.Option(help="Training recordings of each speaker and digit that go to dev/, to choose settings on.")
    ] = 0,
    shuffled: Annotated[
        bool,
        typer.Option(
            "--shuffled", help="A control: training words of other recordings; what is held back stays right."
        ),
    ] = False,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The Free Spoken Digit Dataset, in its own split."""
    from mmctx.datasets.build.fsdd import build_fsdd

    run(
        build_fsdd,
        as_json,
        (0.0, per_shard, shard_mb, workers),
        out=out,
        archive=source,
        num_dev=dev,
        shuffled=shuffled,
    )
