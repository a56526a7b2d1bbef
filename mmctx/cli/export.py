"""Command export: a checkpoint's trunk for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmctx.cli.common import Json, print_answer, table


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="llama, mistral, qwen2, qwen3, gpt2 or bert.")],
    as_json: Json = False,
) -> None:
    """Write trunk and tokenizer as a model that Transformers loads by itself, and compare its logits with ours.

    Exits with 1 if they differ by more than 1e-4 of the largest one.
    """
    from mmctx import api

    answer = api.export(checkpoint, out, to)
    print_answer(answer, as_json, table(answer))
    if answer["largest_difference"] > 1e-4 * max(1.0, answer["largest_logit"]):
        raise typer.Exit(1)
