"""What of a run's configuration does not go together; README, "What does not go together", has it as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmctx.objectives.labelled import LabelledConfig

if TYPE_CHECKING:
    from mmctx.train.config import RunConfig


def check_distribution(config: RunConfig) -> None:
    """Raises ValueError for what several processes cannot share."""
    train, trunk, ranks = config.train, config.model.transformer, config.train.sequence_parallel
    if trunk.num_heads % ranks:
        fitting = [count for count in range(1, trunk.num_heads + 1) if trunk.num_heads % count == 0]
        raise ValueError(
            f"train.sequence_parallel={ranks} must divide model.transformer.num_heads={trunk.num_heads}, which are shared out over the "
            f"ranks; use one of {', '.join(map(str, fitting))}"
        )
    if ranks > 1 and trunk.picture_positions == "grid":
        raise ValueError(
            f"train.sequence_parallel={ranks} may cut a picture in two, and picture_positions: grid needs it whole; use sequence"
        )
    for name, objective in config.objectives.items():
        if ranks > 1 and isinstance(objective, LabelledConfig) and objective.pooling == "mean":
            raise ValueError(
                f"objectives.{name}.pooling: mean needs whole documents, and train.sequence_parallel={ranks} cuts them; use token"
            )
    pieces = {"activations.mlp_tile": train.activations.mlp_tile, "compile": train.compile}
    if ranks > 1 and trunk.dropout and (used := [name for name, value in pieces.items() if value]):
        raise ValueError(
            f"train.{used[0]} cannot be had with train.sequence_parallel={ranks} and dropout, whose masks are those of the whole "
            "sequence; set model.transformer.dropout=0"
        )
    if train.audit and train.distribution.kind == "fsdp2":
        raise ValueError(
            "train.audit looks at whole models, and train.distribution.kind: fsdp2 splits them; run `mmctx audit CONFIG` instead"
        )
    if train.optimizer.kind == "adafactor" and train.distribution.kind == "fsdp2":
        raise ValueError(
            "train.optimizer.kind: adafactor (PyTorch's) cannot take means over the rows and columns of matrices that "
            "train.distribution.kind: fsdp2 splits; use adamw or muon, or distribution.kind: ddp"
        )


def check_sources(config: RunConfig) -> None:
    """Raises ValueError for a source that names an objective which is not there."""
    for where, sources in (("data", config.data.sources), ("eval", config.eval.sources)):
        for name, source in sources.items():
            for objective in source.objectives:
                if objective not in config.objectives:
                    raise ValueError(
                        f"{where}.sources.{name}.objectives names {objective!r}, but `objectives` defines {sorted(config.objectives)}"
                    )


def check_streams(config: RunConfig) -> None:
    """Raises ValueError for what cannot read documents as streams."""
    positions, ranks = config.model.transformer.learned_positions, config.train.sequence_parallel
    for name in config.data.streamed:
        where = f"data.sources.{name}.long_documents is stream"
        kinds = [config.objectives[objective].kind for objective in config.data.sources[name].objectives]
        if kinds != ["captioning"]:
            raise ValueError(
                f"{where}, whose pieces one objective of kind captioning reads in order; its objectives are of kinds {kinds}"
            )
        if positions is not None:
            raise ValueError(
                f"{where}, whose positions count on without end, but model.transformer has learned_positions={positions}; use split, or "
                "rope"
            )
        if config.train.tune.kind == "prefix":
            raise ValueError(
                f"{where}, and train.tune.kind: prefix stands before whole documents; tune by lora or adapter"
            )
        if ranks > 1:
            raise ValueError(
                f"{where}, whose memory lies on one process; train.sequence_parallel={ranks} cuts bins over several: use 1, or "
                "long_documents: split"
            )
