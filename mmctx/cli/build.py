"""`mmctx data build`: shards from what users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mmctx.cli.common import Json, print_answer, progress_bars, table
from mmctx.errors import MmctxError


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
    with progress_bars() as show:
        answer = builders[kind](out, seed=seed, limit=limit, num_workers=workers, progress=show)
    print_answer(answer, as_json, table(answer))
