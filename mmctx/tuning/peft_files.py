"""A tuning as peft writes it: `adapter/adapter_config.json` and `adapter/adapter_model.safetensors` in a checkpoint.

`PeftModel.from_pretrained(base, CHECKPOINT/adapter)` puts it onto a Transformers model of the base. Bottlenecks, which peft does not know,
are written in the same shape under `peft_type: BOTTLENECK`, which it refuses.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.model import MmctxModel
from mmctx.tuning.apply import ADAPTER, added_modules, peft_config, require_peft
from mmctx.tuning.config import AdaLoraTuning, LoraTuning, PrefixTuning

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def saved_modules(model: MmctxModel) -> list[str]:
    """Paths of modules of the base that are trained as a whole beside the adapter: those whose parameters all ask for gradients, outermost
    alone, but no mere containers, which peft refuses.
    """
    added = tuple(added_modules(model))
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in (*found, *added))
        parameters = list(module.parameters())
        whole = bool(parameters) and all(p.requires_grad for p in parameters) and not isinstance(module, _CONTAINERS)
        if name and name not in added and not inside and whole:
            found.append(name)
    return found


def describe_adapter(model: MmctxModel, steps: int, modules: Sequence[str], base: str | None) -> bytes:
    """`adapter_config.json`.

    Args:
        model: tuned.
        steps: of the run.
        modules: see `saved_modules`.
        base: checkpoint that the run started from.
    """
    tuning: Any = model.tuning
    if isinstance(tuning, LoraTuning | AdaLoraTuning):
        marks = {"lora_A", "lora_B"}
        targets = dict.fromkeys(p.rpartition(".")[0] for p in added_modules(model) if p.rpartition(".")[2] in marks)
        config = peft_config(tuning, list(targets), steps)
    elif isinstance(tuning, PrefixTuning):
        trunk = model.config.transformer
        config = require_peft().PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=tuning.num_tokens,
            num_layers=trunk.depth,
            num_attention_heads=trunk.kv_heads,
            token_dim=trunk.kv_heads * trunk.head_width,
            num_transformer_submodules=1,
        )
    else:
        described = {"peft_type": "BOTTLENECK", "base_model_name_or_path": base, "modules_to_save": list(modules)}
        return json.dumps(described | tuning.model_dump(mode="json"), indent=2).encode()
    config.base_model_name_or_path, config.inference_mode = base, True
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = list(modules) or None
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_bytes()


def adapter_tensors(model: MmctxModel, weights: Mapping[str, Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
    """`adapter_model.safetensors`.

    Args:
        model: tuned.
        weights: whole tensors by the model's names.
        modules: see `saved_modules`.
    """
    added = tuple(f"{path}." for path in added_modules(model))
    inside = tuple(f"{path}." for path in modules)
    if isinstance(model.tuning, PrefixTuning):
        layers = [weights[name].flatten(1) for name in weights if name.startswith(added)]  # (P, 2 * K * d) each
        beside = {f"base_model.{name}": tensor for name, tensor in weights.items() if name.startswith(inside)}
        return {"prompt_embeddings": torch.cat(layers, dim=1)} | beside
    return {
        f"base_model.model.{name}".replace(f".{ADAPTER}", "").replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if name.startswith(added + inside)
    }
