"""Commands about runs: train, eval, plan, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmctx.cli.common import Config, Json, Overrides, print_answer, progress_bars, table


def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train a run, from its newest checkpoint if it has one, and evaluate it on held-out data at the end."""
    from mmctx import api
    from mmctx.train.stop import exit_code

    run_config = api.load_config(config, *(overrides or []))
    result = api.train(run_config)
    answer: dict[str, Any] = {
        "run_dir": str(result.run_dir),
        "step": result.step,
        "train_seconds": round(result.train_seconds, 1),
    }
    if result.wish is not None:
        if result.is_main_process:
            print_answer(
                answer | {"interrupted": result.wish.name},
                as_json,
                f"stopped at step {result.step}; run the same command to go on",
            )
        raise typer.Exit(exit_code(result.wish))
    if run_config.eval.sources and result.is_main_process:
        answer["report"] = str(result.run_dir / "report.html")
        with progress_bars() as show:
            answer["results"] = api.evaluate(result.run_dir, progress=show)
    if result.is_main_process:
        print_answer(answer, as_json, _summary(answer))


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    overrides: Overrides = None,
    suite: Annotated[
        str | None, typer.Option(help="Suites to run, separated by commas; the config's by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on its run's held-out data; writes eval.json and report.html beside it."""
    from mmctx import api

    with progress_bars() as show:
        suites = suite.split(",") if suite else None
        results = api.evaluate(checkpoint, suites=suites, overrides=overrides or [], progress=show)
    print_answer(results, as_json, _summary({"results": results}))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the run's folder, or beside several.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one page about a run, or about several side by side: curves, results, examples, what differs. Evaluates nothing."""
    from mmctx import api
    from mmctx.eval.report.run import read_run
    from mmctx.eval.results import ABOUT

    path = api.report(*runs, out=out)
    answer: dict[str, Any] = {"report": str(path), "runs": {}}
    for folder in runs:
        run = read_run(folder)
        answer["runs"][str(folder)] = {
            "step": run.results.get("step"),
            "suites": [n for n in run.results if n not in ABOUT],
        }
    print_answer(answer, as_json, str(path))


def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what a run will read, compute and need, stage by stage, before it runs."""
    from mmctx import api
    from mmctx.train.course import forecast_run

    answer = forecast_run(api.load_config(config, *(overrides or [])), str(config))
    stages = {f"stage {number}": stage for number, stage in enumerate(answer["stages"], 1)}
    print_answer(answer, as_json, table({k: v for k, v in answer.items() if k != "stages"} | stages))


def replay(
    where: Annotated[Path, typer.Argument(help="A run folder, or the run's YAML file.")],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="Counted from 1, as in metrics.jsonl.")] = 1,
    as_json: Json = False,
) -> None:
    """Rebuild the global batch of one step and print its fingerprint; exit 1 if metrics.jsonl has another."""
    from mmctx.train.replay import recorded_fingerprint, replay

    batch = replay(where, step, tuple(overrides or ()))
    recorded = recorded_fingerprint(where, step) if where.is_dir() else None
    answer = {
        "step": step,
        "batch_fingerprint": batch.fingerprint,
        "recorded": recorded,
        "bins": [
            {
                "tokens": packed.num_tokens,
                "documents": len(packed.objectives),
                "samples": packed.num_samples,
                "keys": sorted(set(packed.keys)),
                "skipped": {skip.key: skip.reason for skip in packed.skips},
            }
            for packed in batch.batches
        ],
    }
    lines = [
        f"bin {n}: {b['tokens']} tokens, {b['documents']} documents of {b['samples']} samples"
        for n, b in enumerate(answer["bins"])
    ]
    verdict = {None: "metrics.jsonl has no line of this step", batch.fingerprint: "as in metrics.jsonl"}
    note = verdict.get(recorded, f"metrics.jsonl has {recorded}") if where.is_dir() else ""
    print_answer(answer, as_json, "\n".join([*lines, f"batch_fingerprint {batch.fingerprint} {note}".rstrip()]))
    if recorded not in (None, batch.fingerprint):
        raise typer.Exit(1)


def _summary(answer: dict[str, Any]) -> str:
    """The headline of each suite; `--json`, eval.json and the report have the rest."""
    from mmctx.eval import headlines

    results = answer.get("results", {})
    about = {name: results[name] for name in ("step", "weights") if name in results}
    skipped = {"skipped": results["skipped"]} if results.get("skipped") else {}
    return table(
        {key: value for key, value in answer.items() if key != "results"} | about | headlines(results) | skipped
    )
