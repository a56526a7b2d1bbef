"""The `mmctx` command: parse, build, run, report. Nothing heavy is imported before a command runs.

Answers go to stdout (with `--json` as one JSON object), progress and notes to stderr. Exit codes: 0 well, 1 the answer is no, 2 an error
that the message explains, 130 and 143 stopped by SIGINT and SIGTERM after saving.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import typer

from mmctx.cli import audit, build, convert, data, doctor, export, memory, profile, runs, sweep
from mmctx.errors import MmctxError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Multimodal long-context training.", rich_markup_mode=None
)
data_app = typer.Typer(no_args_is_help=True, help="Build, index, check and look at shards.", rich_markup_mode=None)
app.add_typer(data_app, name="data")
app.add_typer(memory.app, name="memory")

for name, command in {
    "train": runs.train,
    "eval": runs.evaluate,
    "report": runs.report,
    "plan": runs.plan,
    "replay": runs.replay,
    "doctor": doctor.doctor,
    "audit": audit.audit,
    "profile": profile.profile,
    "export": export.export,
    "sweep": sweep.sweep,
}.items():
    app.command(name)(command)
data_app.add_typer(build.app, name="build")
for name, command in {
    "convert": convert.data_convert,
    "tokenizer": data.data_tokenizer,
    "index": data.data_index,
    "check": data.data_check,
    "stats": data.data_stats,
    "view": data.data_view,
}.items():
    data_app.command(name)(command)


def main(arguments: Sequence[str] = ()) -> None:
    """Entry point; `arguments` come before the command line's own."""
    try:
        app(args=[*arguments, *sys.argv[1:]], prog_name="mmctx", standalone_mode=True)
    except MmctxError as error:
        print(f"mmctx: {error}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        raise SystemExit(2) from None
