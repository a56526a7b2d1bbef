"""`mmctx merge`: what LoRA or AdaLoRA added, folded into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmctx.cli.common import Json, print_answer, table


def merge(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint-N folder of a tuned run, or its run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder of the merged checkpoint; it must not exist.")],
    as_json: Json = False,
) -> None:
    """A checkpoint tuned by LoRA or AdaLoRA as one without adapters, with the same outputs; the old one stays."""
    from mmctx.train.merge import merge_checkpoint

    answer = merge_checkpoint(checkpoint, out)
    print_answer(answer, as_json, table(answer))
