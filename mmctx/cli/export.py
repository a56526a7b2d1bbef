"""Command export: a checkpoint's trunk, or its encoders, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmctx.cli.common import Json, print_answer, table


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder for its newest one.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str, typer.Option(help="llama, mistral, qwen2, qwen3, gpt2 or bert; onnx or torch-export for encoders.")
    ],
    clip_seconds: Annotated[float, typer.Option(help="Length of the clips that graphs of sound take.")] = 10.0,
    picture_size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width of pictures, where they keep their shape.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write trunk and tokenizer as a model that Transformers loads by itself, and compare its logits with ours.

    Exits with 1 if they differ by more than 1e-4 of the largest one. With `--to onnx` or `torch-export`, write encoders and similarity
    embeddings as graphs, each compared with the model.
    """
    from mmctx import api

    if to in ("onnx", "torch-export"):
        found = api.export_encoders(checkpoint, out, to, clip_seconds=clip_seconds, picture_size=picture_size)  # type: ignore[arg-type]
        print_answer(found, as_json, table(found))
        return
    answer = api.export_trunk(checkpoint, out, to)
    print_answer(answer, as_json, table(answer))
    if answer["largest_difference"] > 1e-4 * max(1.0, answer["largest_logit"]):
        raise typer.Exit(1)
