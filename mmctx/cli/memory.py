"""`mmctx memory`: knowledge stores."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from mmctx.cli.common import Json, print_answer, progress_bars, table
from mmctx.errors import ConfigError, DataError

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
InputPaths = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Shards (a pattern), folders of files, tables; see also --graph."),
]
EncoderName = Annotated[
    str | None,
    typer.Option(
        "--encoder", help="A run or checkpoint, transformers:FOLDER, or open_clip:NAME@WEIGHTS; the store's own."
    ),
]
Objective = Annotated[str | None, typer.Option(help="Which similarity objective of the run; its first.")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="Texts of shards, such as txt or json:names.zh.")]
ByPath = Annotated[bool, typer.Option("--by-path", help="Keep where media of shards lie, not their bytes.")]
Prefix = Annotated[str, typer.Option(help="What ids begin with, to tell inputs with equal keys apart.")]
Graph = Annotated[str | None, typer.Option(help="Inputs are knowledge graphs: wordnet, ntriples or tsv.")]
Pictures = Annotated[
    list[str] | None,
    typer.Option(help="With --graph: an input whose captions name pictures of subjects; may be repeated."),
]
Relations = Annotated[list[str] | None, typer.Option("--relation", help="With --graph: only these; may be repeated.")]
IndexKind = Annotated[str, typer.Option(help="ivf, hnsw (slow to make), or none: search exactly.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Knowledge stores: build, change and ask them.")


@app.command()
def build(
    store: StorePath,
    inputs: InputPaths,
    encoder: EncoderName = None,
    objective: Objective = None,
    text: Texts = None,
    by_path: ByPath = False,
    prefix: Prefix = "",
    graph: Graph = None,
    pictures: Pictures = None,
    relation: Relations = None,
    index: IndexKind = "ivf",
    as_json: Json = False,
) -> None:
    """Make a store of documents, embedded by --encoder. Stopped and called again, it goes on."""
    from mmctx import api
    from mmctx.store.store import Store

    if encoder is None:
        raise ConfigError("a new store needs --encoder: a run, transformers:FOLDER, or open_clip:NAME@WEIGHTS")
    opened = api.open_encoder(encoder, objective)
    readers = _readers(inputs, text, by_path, prefix, graph, pictures, relation)
    made = Store.open(store) if (store / "entries.lance").is_dir() else Store.create(store, opened.provenance)
    _fill(made, opened, readers, index, as_json)


@app.command()
def add(
    store: StorePath,
    inputs: InputPaths,
    encoder: EncoderName = None,
    objective: Objective = None,
    text: Texts = None,
    by_path: ByPath = False,
    prefix: Prefix = "",
    graph: Graph = None,
    pictures: Pictures = None,
    relation: Relations = None,
    index: IndexKind = "ivf",
    as_json: Json = False,
) -> None:
    """Add documents; those whose id is there take its place if they differ."""
    from mmctx import api
    from mmctx.store.store import Store

    opened = Store.open(store)
    readers = _readers(inputs, text, by_path, prefix, graph, pictures, relation)
    _fill(opened, api.encoder_of(opened, encoder, objective), readers, index, as_json)


@app.command()
def remove(
    store: StorePath,
    ids: Annotated[list[str] | None, typer.Argument(help="Documents to remove.")] = None,
    listed: Annotated[
        Path | None, typer.Option("--from", help="File of ids: one a line, or JSON lines with id.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="All that came from this input.")] = None,
    erase: Annotated[bool, typer.Option("--erase", help="Also delete their bytes: writes the store anew.")] = False,
    as_json: Json = False,
) -> None:
    """Remove documents: from then on nothing finds or cites them. Exits with 1 if one was not there."""
    from mmctx.store.read import read_ids
    from mmctx.store.store import Store

    wanted = [*(ids or []), *(read_ids(listed) if listed else [])]
    if not wanted and source is None and not erase:
        raise ConfigError("name documents to remove: ids, --from FILE or --source INPUT")
    opened = Store.open(store)
    there = opened.digests(wanted)
    missing = sorted(set(wanted) - there.keys())
    count = opened.remove(wanted, source)
    if erase:
        kind = opened.describe()["index"].get("kind")
        opened.erase()
        if kind:
            opened.build_index(kind)
    answer = {
        "removed": count,
        "missing": missing,
        "erased": erase,
        "version": opened.version,
        "documents": len(opened),
    }
    print_answer(answer, as_json, table(answer))
    if missing:
        raise typer.Exit(1)


@app.command()
def query(
    store: StorePath,
    text: Annotated[str | None, typer.Option(help="A text to look for.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to look for.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A clip to look for.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many parts to find.")] = 10,
    kind: Annotated[list[str] | None, typer.Option(help="Only text, image or audio; may be repeated.")] = None,
    source: Annotated[str | None, typer.Option(help="Only of this input.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with everything, not through the index.")] = False,
    encoder: EncoderName = None,
    objective: Objective = None,
    as_json: Json = False,
) -> None:
    """Find what is most similar to a text, a picture or a clip. Exits with 1 if there is nothing."""
    from mmctx import api
    from mmctx.store.entries import KINDS
    from mmctx.store.recall import embed_query
    from mmctx.store.store import Store

    asked: list[tuple[Any, str | Path]] = [
        (name, value) for name, value in (("text", text), ("image", image), ("audio", audio)) if value is not None
    ]
    if len(asked) != 1:
        raise ConfigError(f"ask by one of --text, --image and --audio, found {len(asked)}")
    if unknown := set(kind or ()) - set(KINDS):
        raise ConfigError(f"--kind is text, image or audio, not {sorted(unknown)[0]!r}")
    opened = Store.open(store)
    name, value = asked[0]
    content = value if isinstance(value, str) else _read(value)
    vector = embed_query(opened, api.encoder_of(opened, encoder, objective), name, content)
    (hits,) = opened.search(vector, k, kinds=kind or (), source=source, exact=exact)  # type: ignore[arg-type]
    shown = [{**_fields(hit), "score": round(hit.score, 4)} for hit in hits]
    lines = [f"{hit.score:7.4f}  {hit.id}  {hit.kind}  {(hit.text or '')[:90]!r}" for hit in hits]
    print_answer({"version": opened.version, "hits": shown}, as_json, "\n".join(lines) or "nothing found")
    if not hits:
        raise typer.Exit(1)


@app.command()
def pack(
    store: StorePath,
    shards: Annotated[str, typer.Argument(help="Samples to put behind their neighbours.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new shards.")],
    neighbours: Annotated[int, typer.Option(help="Documents in front of each sample, the nearest next to it.")] = 3,
    loss: Annotated[
        str, typer.Option(help="What is predicted: all, own (the sample's texts), or answer (its last).")
    ] = "all",
    among: Annotated[
        str | None,
        typer.Option(help="The store's input that neighbours come from; SHARDS itself. Never held-out ones."),
    ] = None,
    text: Texts = None,
    per_shard: Annotated[int, typer.Option(help="Most samples of a shard.")] = 1000,
    encoder: EncoderName = None,
    objective: Objective = None,
    as_json: Json = False,
) -> None:
    """Write shards of documents that begin with their nearest neighbours in a store: exact search, no duplicates of themselves."""
    from mmctx import api
    from mmctx.datasets.build.writer import BuildOptions
    from mmctx.store.pack import pack_neighbours
    from mmctx.store.store import Store

    if loss not in ("all", "own", "answer"):
        raise ConfigError(f"--loss is all, own or answer, not {loss!r}")
    opened = Store.open(store)
    with progress_bars() as show:
        options = BuildOptions(samples_per_shard=per_shard, num_workers=1, progress=show)
        answer = pack_neighbours(
            opened,
            shards,
            out,
            lambda: api.encoder_of(opened, encoder, objective),
            neighbours=neighbours,
            learned=cast(Any, loss),
            among=among,
            texts=tuple(text or ("txt",)),
            options=options,
        )
    short = {name: len(value) if isinstance(value, list) else value for name, value in answer.items()}
    print_answer(answer, as_json, table(short))


@app.command()
def info(store: StorePath, as_json: Json = False) -> None:
    """What a store holds, and which encoder made it."""
    from mmctx.store.store import Store

    answer = Store.open(store).describe()
    print_answer(answer, as_json, table(answer))


def _readers(
    inputs: list[str],
    text: list[str] | None,
    by_path: bool,
    prefix: str,
    graph: str | None,
    pictures: list[str] | None,
    relations: list[str] | None,
) -> list[Any]:
    from mmctx.store.graphs import FORMATS, documents, pictures_by_name, read_graph
    from mmctx.store.read import Inputs

    texts = tuple(text or ("txt",))
    if graph is None:
        if pictures or relations:
            raise ConfigError("--pictures and --relation belong to --graph wordnet, ntriples or tsv")
        return [Inputs(where, texts, by_path=by_path, prefix=prefix) for where in inputs]
    if graph not in FORMATS:
        raise ConfigError(f"--graph is {', '.join(FORMATS)}, not {graph!r}")
    named = pictures_by_name(document for where in pictures or () for document in Inputs(where, texts))
    wanted = relations or ()
    return [documents(read_graph(Path(where), graph), where, named, wanted, prefix) for where in inputs]  # type: ignore[arg-type]


def _fill(store: Any, encoder: Any, inputs: list[Iterable[Any]], index: str, as_json: bool) -> None:
    """Adds inputs, tidies up, brings the index up to date and prints what became of the documents."""
    from mmctx.store.ingest import Added, ingest

    if index not in ("ivf", "hnsw", "none"):
        raise ConfigError(f"--index is ivf, hnsw or none, not {index!r}")
    total, before, seen = Added(), store.describe()["index"], set()
    with progress_bars() as show:
        for number, documents in enumerate(inputs, 1):
            size = getattr(documents, "total", 0)
            stage = f"input {number} of {len(inputs)}"
            found = ingest(store, encoder, documents, lambda n, s=stage, t=size: show(s, n, max(n, t)), seen)
            total.added, total.updated = total.added + found.added, total.updated + found.updated
            total.unchanged += found.unchanged
            total.left_out += found.left_out
    store.tidy()
    vectors = store.num_vectors()
    if index != "none" and (not before or before["kind"] != index or not 0.8 < vectors / before["vectors"] < 1.25):
        store.build_index(index)
    answer = total.summary() | store.describe()
    answer["examples_left_out"] = [f"{entry.key}: {entry.detail}" for entry in total.left_out[:3]]
    print_answer(answer, as_json, table(answer))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _fields(hit: Any) -> dict[str, Any]:
    return {name: getattr(hit, name) for name in ("id", "part", "kind", "text", "source")}
