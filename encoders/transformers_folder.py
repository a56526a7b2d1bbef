"""Reads what Transformers' `save_pretrained` left in a folder: configuration, preprocessing, weights under the names they have on disk.

Those names are older than Transformers' modules and outlive them, so nothing here depends on its release.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmctx.errors import ConfigError


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """One of the folder's JSON files.

    Raises:
        ConfigError: there is no such file, or it is no JSON.
    """
    path = Path(folder) / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"pretrained: {path} is missing; name a folder that Transformers' save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise ConfigError(f"pretrained: {path} is not JSON: {error}") from None


def model_type(folder: str | Path, known: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The folder's `model_type` and its config.json.

    Raises:
        ConfigError: it is none of `known`.
    """
    config = read_json(folder, "config.json")
    found = str(config.get("model_type"))
    if found not in known:
        raise ConfigError(
            f"pretrained: {folder} holds a model of type {found!r}, expected {' or '.join(map(repr, known))}"
        )
    return found, config


def read_weights(folder: str | Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors below the first of `prefixes` that the folder has, which is taken off their names.

    Args:
        folder: with `model.safetensors`, or several files and their index.
        prefixes: such as `model.encoder.`; "" for all tensors.

    Raises:
        ConfigError: no such tensors, or a file is missing or damaged.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(folder, index.name)["weight_map"]
    else:
        files = dict.fromkeys(_keys(folder / "model.safetensors"), "model.safetensors")
    for prefix in prefixes:
        names = [name for name in files if name.startswith(prefix)]
        if names:
            return _read(folder, {name: files[name] for name in names}, prefix)
    raise ConfigError(f"pretrained: {folder} has no tensors below {' or '.join(map(repr, prefixes))}")


def _keys(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _read(folder: Path, files: dict[str, str], prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        with _opened(folder / name) as file:
            found |= {key.removeprefix(prefix): file.get_tensor(key) for key, where in files.items() if where == name}
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"pretrained: {path} cannot be read ({error}); weights are taken from safetensors alone: save the model again "
            "with Transformers' save_pretrained"
        ) from None
