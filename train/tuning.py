"""What `train.tune` means to a run: what it does not go with, and which parameters are trained when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmctx.errors import ConfigError
from mmctx.train.optim.modules import Modules, in_force, settings_of
from mmctx.tuning import default_freezing

if TYPE_CHECKING:
    from mmctx.model import MmctxModel
    from mmctx.train.config import RunConfig
    from mmctx.train.init import Origin
    from mmctx.train.stages import Stage


def check_tuning(config: RunConfig) -> None:
    """Raises ValueError for a tuning that a run cannot have."""
    train, kind = config.train, config.train.tune.kind
    if kind == "full":
        return
    if train.init is None and config.model.transformer.pretrained is None:
        raise ValueError(
            f"train.tune.kind: {kind} trains a little beside frozen weights that nothing has trained; set train.init to a checkpoint"
        )
    if train.tune.kind == "prefix" and train.sequence_parallel > 1:
        raise ValueError(
            f"train.tune.kind: prefix puts tokens in front of whole documents, and train.sequence_parallel={train.sequence_parallel} cuts "
            "them; use lora, or sequence_parallel=1"
        )
    if train.tune.kind == "prefix" and config.model.transformer.memory is not None:
        raise ValueError(
            "train.tune.kind: prefix is no part of a document's past, which model.transformer.memory looks back into; tune by lora or "
            "adapter"
        )
    positions = config.model.transformer.learned_positions
    if train.tune.kind == "prefix" and positions is not None:
        needed = config.data.context_length + train.tune.num_tokens
        if needed > positions:
            raise ValueError(
                f"train.tune.num_tokens={train.tune.num_tokens} before data.context_length={config.data.context_length} tokens need "
                f"{needed} positions, and model.transformer.learned_positions is {positions}; lower context_length"
            )
    if train.tune.kind == "adalora":
        if train.distribution.kind == "fsdp2":
            raise ValueError(
                "train.tune.kind: adalora ranks the entries of all layers, which train.distribution.kind: fsdp2 splits; use ddp, or lora"
            )
        steps = config.steps if config.schedule else config.train.steps
        if steps is not None and train.tune.start + train.tune.settle >= steps:
            raise ValueError(
                f"train.tune.start={train.tune.start} and settle={train.tune.settle} leave none of the run's {steps} steps to choose "
                "ranks in"
            )


def modules_of(model: MmctxModel, stage: Stage) -> Modules:
    """The settings of modules that hold in a stage, what a tuning freezes included."""
    return in_force(stage.config.train.modules, default_freezing(model))


def never_trained(model: MmctxModel, stages: Sequence[Stage]) -> set[str]:
    """Names of the parameters that no stage trains."""
    in_stages = [modules_of(model, stage) for stage in stages]
    return {name for name, _ in model.named_parameters() if all(settings_of(name, m).freeze for m in in_stages)}


def check_trained(model: MmctxModel, origin: Origin, config: RunConfig) -> None:
    """Raises ConfigError where a tuning would leave weights at random that the checkpoint lacks."""
    untrained = never_trained(model, config.stages)
    for name in origin.new:
        if model.tuning is not None and name in untrained:
            module = name.rpartition(".")[0] or name
            raise ConfigError(
                f"train.init={config.train.init} has no {name}, and train.tune.kind={model.tuning.kind} freezes it: it would stay as it "
                f"was drawn. Train it with train.modules={{{module}: {{freeze: false}}}}, or start from a checkpoint that has it"
            )
