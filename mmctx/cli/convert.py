"""`mmctx data convert`: interleaved documents of other projects into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmctx.cli.build import Heldout, Out, PerShard, ShardMb, Workers, run
from mmctx.cli.common import Json


def data_convert(
    layout: Annotated[str, typer.Argument(help="obelics, mmc4 or energon.")],
    out: Out,
    sources: Annotated[
        list[Path], typer.Argument(help="JSON-lines or Parquet files; tars for energon; folders of them.")
    ],
    images: Annotated[list[Path] | None, typer.Option(help="Folder or tar of pictures; may be repeated.")] = None,
    addresses: Annotated[Path | None, typer.Option(help="CSV with url and file: where pictures were put.")] = None,
    image_after_text: Annotated[
        bool, typer.Option("--image-after-text", help="mmc4: a picture follows its text instead of preceding it.")
    ] = False,
    heldout: Heldout = 0.0,
    per_shard: PerShard = 1000,
    shard_mb: ShardMb = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Rewrite interleaved documents of other projects: OBELICS, MMC4, Megatron-Energon."""
    from mmctx.datasets.build.convert import convert

    arguments = {"images": images or (), "addresses": addresses, "image_after_text": image_after_text}
    limits = (heldout, per_shard, shard_mb, workers)
    run(convert, as_json, limits, layout=layout, sources=sources, out=out, **arguments)
