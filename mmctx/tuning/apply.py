"""Adds what a tuning trains to a model, and folds it into the weights where that can be done.

LoRA and AdaLoRA are peft's layers, put in place of linear layers. Prefixes and bottlenecks are modules of ours in the places where peft's
and the papers' are. A layer that is wrapped keeps its weights in `base_layer`; on the disk they keep the name that they had (`disk_name`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmctx.errors import ConfigError
from mmctx.tuning.bottleneck import Bottleneck
from mmctx.tuning.config import AdaLoraTuning, AdapterTuning, AnyTuning, LoraTuning, PrefixTuning
from mmctx.tuning.prefix import LayerPrefix, Prefix

if TYPE_CHECKING:
    from mmctx.model import MmctxModel

ADAPTER = "default"
"""Peft's name of the one adapter."""
_ADDED = ("lora_A", "lora_B", "lora_E", "prefix", "bottleneck")
"""Modules that hold what is added and trained."""


def apply_tuning(model: MmctxModel, tuning: AnyTuning, steps: int) -> None:
    """Adds parameters, drawn from the global generator, that change nothing yet or little; `full` adds none.

    Args:
        model: with the weights of its base, or before they are loaded.
        tuning: which.
        steps: of the run, which AdaLoRA's budget follows.

    Raises:
        ConfigError: peft is not installed, or `targets` names no linear layer.
    """
    if tuning.kind == "full":
        return
    model.tuning = tuning
    if isinstance(tuning, PrefixTuning):
        trunk = model.config.transformer
        for block in model.trunk.blocks:
            block.attention.prefix = LayerPrefix(tuning.num_tokens, trunk.kv_heads, trunk.head_width)  # type: ignore[union-attr]
        model.prefix = Prefix([block.attention.prefix for block in model.trunk.blocks])  # type: ignore[union-attr, misc]
    elif isinstance(tuning, AdapterTuning):
        for block in model.trunk.blocks:
            places: list[tuple[Any, str]] = [(block.mlp, "down")] + [(block.attention, "out")] * (
                tuning.places == "both"
            )
            for parent, name in places:
                setattr(parent, name, Bottleneck(getattr(parent, name), tuning.width))
    else:
        config = peft_config(tuning, find_targets(model, tuning.targets), steps)
        require_peft().inject_adapter_in_model(config, model, ADAPTER)


def require_peft() -> Any:
    """The package peft.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ConfigError("train.tune needs the package peft: pip install 'mmctx[tune]'") from None
    return peft


def find_targets(model: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    """Paths of the linear layers that `targets` names.

    Raises:
        ConfigError: one names none.
    """
    opaque = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name.startswith(f"{path}.") for path in opaque)
    ]
    chosen: dict[str, None] = {}
    for target in targets or ("trunk",):
        found = [name for name in linear if f".{target}." in f".{name}."]
        if not found:
            shown = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in linear))
            raise ConfigError(f"train.tune.targets: no linear layer is named {target!r}; there are {shown}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def peft_config(tuning: LoraTuning | AdaLoraTuning, targets: list[str], steps: int) -> Any:
    """The same as peft says it."""
    peft, common = require_peft(), {"target_modules": targets, "lora_alpha": tuning.alpha, "task_type": "CAUSAL_LM"}
    if isinstance(tuning, LoraTuning):
        return peft.LoraConfig(r=tuning.rank, use_rslora=tuning.rank_stabilized, **common)
    return peft.AdaLoraConfig(
        init_r=tuning.initial_rank,
        target_r=tuning.rank,
        tinit=tuning.start,
        tfinal=tuning.settle,
        deltaT=tuning.every,
        beta1=tuning.beta,
        beta2=tuning.beta,
        orth_reg_weight=tuning.orthogonality,
        total_step=max(steps, tuning.start + tuning.settle + 2),  # peft asks for some steps to choose in, whoever asks
        **common,
    )


def added_modules(model: nn.Module) -> Iterator[str]:
    """Paths of the modules that hold what a tuning added and trains."""
    return (name for name, _ in model.named_modules() if name.rpartition(".")[2] in _ADDED)


def default_freezing(model: MmctxModel) -> dict[str, bool]:
    """Module path -> whether it is frozen unless `train.modules` says otherwise: of a tuned model all that is neither added nor an
    objective's own.
    """
    if model.tuning is None:
        return {}
    base = {name: True for name, _ in model.named_children() if name != "objectives"}
    return base | dict.fromkeys(added_modules(model), False)


def disk_name(name: str) -> str:
    """The name that a tensor of a tuned model has in `model.safetensors`: tensors of the base are called what they are without a tuning."""
    return name.replace(".base_layer.", ".")


def merge(model: MmctxModel) -> None:
    """Folds what LoRA or AdaLoRA added into the weights: a model without a tuning, with the same outputs up to rounding.

    Raises:
        ConfigError: prefixes and bottlenecks cannot be written as weights of the base.
    """
    if model.tuning is None:
        return
    if model.tuning.kind not in ("lora", "adalora"):
        raise ConfigError(
            f"tune.kind={model.tuning.kind} adds what no matrix of the base can hold, so it cannot be merged; the checkpoint itself holds "
            "base and adapter and is loaded as it is"
        )
    set_merged(model, True)
    for path, layer in list(_tuned_layers(model)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    model.tuning = None


def without_tuning(run: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run, as a tree, of whose model the tuning has been merged into the weights."""
    train = {**run["train"], "tune": {"kind": "full"}, "init": None, "ema": None, "modules": {}}
    return {**run, "train": train, "eval": {**run["eval"], "weights": "trained"}}


def unmerge(model: MmctxModel) -> None:
    """Undoes `set_merged`."""
    set_merged(model, False)


@torch.no_grad()
def set_merged(model: nn.Module, merged: bool) -> None:
    """Whether LoRA's or AdaLoRA's layers compute with one matrix each, the layers staying in place."""
    for _, layer in _tuned_layers(model):
        if layer.merged != merged:
            layer.merge() if merged else layer.unmerge()


def _tuned_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer  # AdaLoRA's are such, too

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def renamed(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors by their names on the disk -> by their names in a model; what it does not have keeps its name."""
    names = {disk_name(name): name for name in model.state_dict()}
    return {names.get(name, name): tensor for name, tensor in weights.items()}
