"""A Transformers model on the disk: its `config.json` and its tensors, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmctx.errors import ConfigError

KEY = "model.transformer.pretrained"
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


def refuse(folder: Path, key: str, value: Any, remedy: str) -> ConfigError:
    """The error about a key of `config.json` that the trunk cannot do."""
    return ConfigError(f"{KEY}: {folder / 'config.json'} has {key}={value!r}; {remedy}")


def read_config(folder: Path) -> Any:
    """The folder's configuration as Transformers completes it, a `PreTrainedConfig`.

    Raises:
        ConfigError: it is missing or unreadable, or its weights are quantised.
    """
    from transformers import CONFIG_MAPPING  # slow to import

    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        kind = tree["model_type"]
    except FileNotFoundError:
        raise ConfigError(f"{KEY}: there is no {path}; name the folder of a Transformers model") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{KEY}: {path} is not a Transformers configuration ({type(error).__name__}: {error})"
        ) from None
    if tree.get("quantization_config"):
        method = tree["quantization_config"].get("quant_method")
        raise refuse(
            folder, "quantization_config.quant_method", method, "name a folder of weights in bf16, fp16 or fp32"
        )
    if kind not in CONFIG_MAPPING:
        raise refuse(folder, "model_type", kind, "this Transformers does not know it")
    try:
        return CONFIG_MAPPING[kind].from_dict(tree)
    except Exception as error:  # Transformers validates with errors of its own
        raise ConfigError(f"{KEY}: {path} does not describe a model: {error}") from None


class Weights:
    """The tensors of a folder, by names without what the class of the model puts before them.

    `model.layers.0...` of a `LlamaForCausalLM` and `layers.0...` of a `LlamaModel` are the same.

    Args:
        folder: with `model.safetensors`, or with shards and `model.safetensors.index.json`.
        prefix: `model.`, `transformer.` or `bert.`.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        whole, index = folder / _WHOLE, folder / _INDEX
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
        elif whole.is_file():
            with self._open(whole) as tensors:
                files = dict.fromkeys(tensors.keys(), _WHOLE)
        else:
            raise ConfigError(
                f"{KEY}: {folder} holds neither {_WHOLE} nor {_INDEX}; pickles are not read: write safetensors by "
                "AutoModel.from_pretrained(...).save_pretrained(...)"
            )
        self._files: dict[str, tuple[str, str]] = {
            _modern(name.removeprefix(prefix)): (file, name) for name, file in files.items()
        }
        self.unread = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ConfigError: there is none of this name, or its file is damaged.
        """
        if name not in self._files:
            raise ConfigError(f"{KEY}: {self.folder} holds no tensor {name!r}, which its config.json promises")
        file, full_name = self._files[name]
        self.unread.discard(name)
        with self._open(self.folder / file) as tensors:
            return tensors.get_tensor(full_name)

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{KEY}: {path} cannot be read ({error}); fetch it again") from None


def _modern(name: str) -> str:
    """BERT's first checkpoints call a norm's weight and bias gamma and beta, as TensorFlow does."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
