"""The `mmctx` command: parse, build, run, report. Nothing heavy is imported before a command runs.

Answers go to stdout (with `--json` as one JSON object), progress and notes to stderr. Exit codes: 0 well, 1 the answer is no, 2 an error
that the message explains, 130 interrupted after saving.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mmctx.errors import MmctxError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Multimodal long-context training.", rich_markup_mode=None
)
data_app = typer.Typer(no_args_is_help=True, help="Build and index shards.", rich_markup_mode=None)
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Config = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes, such as train.steps=1000.")]


def main(arguments: Sequence[str] = ()) -> None:
    """Entry point; `arguments` come before the command line's own."""
    try:
        app(args=[*arguments, *sys.argv[1:]], prog_name="mmctx", standalone_mode=True)
    except MmctxError as error:
        print(f"mmctx: {error}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        raise SystemExit(2) from None


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train a run, from its newest checkpoint if it has one, and evaluate it on held-out data at the end."""
    from mmctx import api

    run_config = api.load_config(config, *(overrides or []))
    result = api.train(run_config)
    answer: dict[str, Any] = {
        "run_dir": str(result.run_dir),
        "step": result.step,
        "train_seconds": round(result.train_seconds, 1),
    }
    if result.interrupted:
        if result.is_main_process:
            _answer(
                answer | {"interrupted": True}, as_json, f"stopped at step {result.step}; run the same command to go on"
            )
        raise typer.Exit(130)
    if run_config.eval.sources and result.is_main_process:
        answer["report"] = str(result.run_dir / "report.html")
        with _progress() as show:
            answer["results"] = api.evaluate(result.run_dir, progress=show)
    if result.is_main_process:
        _answer(answer, as_json, _summary(answer))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    overrides: Overrides = None,
    suite: Annotated[
        str | None, typer.Option(help="Suites to run, separated by commas; the config's by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on its run's held-out data; rewrites report.json and report.html beside it."""
    from mmctx import api

    with _progress() as show:
        suites = suite.split(",") if suite else None
        results = api.evaluate(checkpoint, suites=suites, overrides=overrides or [], progress=show)
    _answer(results, as_json, _summary({"results": results}))


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a run will read, before it runs."""
    from mmctx import api
    from mmctx.datasets.forecast import forecast

    run_config = api.load_config(config, *(overrides or []))
    data = api.build_dataset(run_config)
    answer = forecast(run_config.data, data, run_config.train.steps, run_config.train.seed)
    _answer(answer, as_json, _table(answer))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check every attention backend against a dense float64 reference and name the fastest that passes."""
    from mmctx.attention.certify import certify, choose

    certificates = certify()
    answer = {"choice": choose(certificates), "backends": [certificate.to_json() for certificate in certificates]}
    _answer(answer, as_json, _doctor_table(answer))
    if any(certificate.usable and not certificate.passed for certificate in certificates):
        raise typer.Exit(1)


@data_app.command("build")
def data_build(
    kind: Annotated[str, typer.Argument(help="What to build: emoji.")],
    out: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    seed: Annotated[int, typer.Option(help="Voices and books are drawn from it.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only so many emoji, for a quick look.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core by default.")] = None,
    as_json: Json = False,
) -> None:
    """Make WebDataset shards of pictures, speech and text from packages on this machine."""
    from mmctx.datasets.build.emoji import build_emoji

    builders: dict[str, Callable[..., dict[str, Any]]] = {"emoji": build_emoji}
    if kind not in builders:
        raise MmctxError(f"mmctx data build knows {', '.join(builders)}, not {kind!r}")
    with _progress() as show:
        answer = builders[kind](out, seed=seed, limit=limit, num_workers=workers, progress=show)
    _answer(answer, as_json, _table(answer))


@data_app.command("index")
def data_index(
    shards: Annotated[list[str], typer.Argument(help="Paths, with {0000..0099} braces or wildcards.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, to count text tokens too.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Where texts stand: txt, json:names.zh. May be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0 for none besides this one.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Rebuild what looks fresh, too.")] = False,
    as_json: Json = False,
) -> None:
    """Write the sidecar index of each shard, where it is missing or stale."""
    from mmctx.datasets.index import expand_shards, index_shards
    from mmctx.datasets.source import summarise

    loaded = None
    if tokenizer is not None:
        from mmctx.tokenizer import TextTokenizer

        loaded = TextTokenizer(tokenizer)
    paths = [path for pattern in shards for path in expand_shards(pattern)]
    with _progress() as show:
        texts = tuple(text or ["txt"])
        indexed = index_shards(
            paths, loaded, texts, workers, lambda done, total: show("index", done, total), force=force
        )
    answer = summarise(indexed)
    _answer(answer, as_json, _table(answer))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that draws a bar for each stage, on stderr, where a terminal is attached."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show


def _answer(answer: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(answer) if as_json else text)  # ASCII alone: keys of tars may be any bytes


def _table(answer: dict[str, Any], indent: str = "") -> str:
    """Nested dicts as aligned lines."""
    lines = []
    for key, value in answer.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", _table(value, indent + "  ")]
        else:
            shown = (
                f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
            )
            lines.append(f"{indent}{key:<{max(1, 28 - len(indent))}} {shown}")
    return "\n".join(line for line in lines if line)


def _summary(answer: dict[str, Any]) -> str:
    results = dict(answer.get("results", {}))
    if "caption" in results:
        results["caption"] = {name: value for name, value in results["caption"].items() if name != "examples"}
    return _table({key: value for key, value in answer.items() if key != "results"} | results)


def _doctor_table(answer: dict[str, Any]) -> str:
    lines = []
    for backend in answer["backends"]:
        reason = backend["why_not"] or ""
        verdict = (
            "certified" if backend["passed"] else f"FAILED {reason}" if backend["usable"] else f"cannot run: {reason}"
        )
        lines.append(f"{backend['backend']:<14} {backend.get('dtype') or '':<10} {verdict}")
    return "\n".join([*lines, f"fastest certified: {answer['choice']}"])


if __name__ == "__main__":
    main()
