"""`train.init`: a fresh run that starts from the weights of a checkpoint of ours.

What the checkpoint says of the model and its tokenizer is the default of a run that starts from it, so that its YAML states what differs. A
run that goes on reads its own checkpoints: the one that it started from may be gone by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmctx.errors import CheckpointError, ConfigError
from mmctx.model import MmctxModel, ModelConfig
from mmctx.tuning import merge

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Origin:
    """What a fresh model took from a checkpoint.

    Attributes:
        checkpoint: its folder.
        new: tensors that it does not have: they were drawn from the run's seed.
        left: tensors of the checkpoint that the model has no place for, such as heads of other objectives.
    """

    checkpoint: Path
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """For the log."""
        parts = [f"weights of {self.checkpoint}"]
        if self.new:
            parts.append(f"new, from the run's seed: {_modules(self.new)}")
        if self.left:
            parts.append(f"not used: {_modules(self.left)}")
        return "; ".join(parts)


def _modules(names: tuple[str, ...]) -> str:
    """The modules that tensors lie in, each once."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


def inherit(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's tree with `model`, `data.tokenizer` and `data.bos` filled up from the checkpoint that it starts from, or from the run's own.

    Raises:
        CheckpointError: `train.init` holds no whole checkpoint, and the tree needs it.
    """
    from mmctx.train.checkpoints.layout import newest_whole, resolve_checkpoint
    from mmctx.train.checkpoints.load import load_run_config

    data, run = tree.get("data"), tree.get("run")
    if (
        not isinstance(data, Mapping)
        or not isinstance(run, Mapping)
        or not isinstance(tree.get("model") or {}, Mapping)
    ):
        return tree  # the validation will say what is wrong
    init = Path(str(tree["train"]["init"]))
    if _is_complete(tree):
        return tree
    own = newest_whole(Path(str(run.get("dir", "runs"))) / str(run.get("name")), optimizer=False)
    checkpoint = own or resolve_checkpoint(init)
    tokenizer = str(checkpoint) if own is None else _tokenizer_of(own)
    model = overlaid(_shape_of(checkpoint).model_dump(mode="json"), tree.get("model") or {})
    bos = load_run_config(checkpoint).data.bos
    return {**tree, "model": model, "data": {"tokenizer": tokenizer, "bos": bos, **data}}


def _is_complete(tree: Mapping[str, Any]) -> bool:
    """Whether it says all itself, as those that runs keep do."""
    model = tree.get("model")
    if (
        "tokenizer" not in tree["data"]
        or not isinstance(model, Mapping)
        or not isinstance(model.get("transformer"), Mapping)
    ):
        return False
    fields = type(ModelConfig().transformer).model_fields
    return ModelConfig.model_fields.keys() <= model.keys() and fields.keys() <= model["transformer"].keys()


def _tokenizer_of(own: Path) -> str:
    """Where a run found its tokenizer, if it still lies there; its checkpoints hold it, too."""
    from mmctx.train.checkpoints.load import load_run_config

    path = load_run_config(own).data.tokenizer
    return path if (Path(path) / "tokenizer.json").is_file() else str(own)


def _shape_of(checkpoint: Path) -> ModelConfig:
    from mmctx.train.checkpoints.load import load_run_config, without_pretrained
    from mmctx.train.checkpoints.state import read_state
    from mmctx.train.stages import trained_stage

    return without_pretrained(trained_stage(load_run_config(checkpoint), read_state(checkpoint).step).config.model)


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, branch by branch; a branch of another `kind` takes the place of the whole."""
    found = dict(base)
    for name, value in over.items():
        below = found.get(name)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        same_kind = both and value.get("kind", below.get("kind")) == below.get("kind")  # type: ignore[union-attr]
        found[name] = overlaid(below, value) if same_kind else value  # type: ignore[arg-type]
    return found


def start_from(model: MmctxModel, folder: str) -> Origin:
    """Copies all weights of a checkpoint that have a place in a model; what LoRA added to the checkpoint is folded into them.

    Args:
        model: fresh, before a tuning is applied.
        folder: a checkpoint, or a run's folder for its newest one.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: a tensor of it has another shape, or it holds a prefix or bottlenecks.
    """
    from mmctx.train.checkpoints.layout import resolve_checkpoint

    checkpoint = resolve_checkpoint(Path(folder))
    theirs, ours = _plain_weights(checkpoint), model.state_dict()
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            raise ConfigError(
                f"train.init={folder}: {name} has the shape {list(theirs[name].shape)} there and {list(ours[name].shape)} in this run; "
                f"{_remedy(name)}"
            )
    if not ours.keys() & theirs.keys():
        raise ConfigError(f"train.init={folder}: none of its {len(theirs)} tensors has a place in this model")
    with torch.no_grad():
        for name, tensor in ours.items():
            if name in theirs:
                tensor.copy_(theirs[name])
    return Origin(checkpoint, tuple(n for n in ours if n not in theirs), tuple(n for n in theirs if n not in ours))


def _remedy(name: str) -> str:
    if name.startswith("objectives."):
        return f"give objectives.{name.split('.')[1]} another name to train a new head"
    if name.startswith(("embedding", "head")):
        return "leave out data.tokenizer to take the checkpoint's own"
    return "leave out of `model` what changes its size"


def _plain_weights(checkpoint: Path) -> dict[str, Tensor]:
    """As if it had been trained without a tuning."""
    from mmctx.train.checkpoints.load import load_run_config, load_tensors, read_model

    if load_run_config(checkpoint).train.tune.kind == "full":
        return load_tensors(checkpoint)
    model, _, _ = read_model(checkpoint)
    try:
        merge(model)
    except ConfigError as error:
        raise CheckpointError(f"train.init={checkpoint}: {error}") from None
    return model.state_dict()
