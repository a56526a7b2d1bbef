"""Strict configuration: one YAML file plus dotted ``key=value`` overrides into one pydantic tree.

Every configurable class keeps its config beside it as a `StrictModel`; this module knows none of them. The root of the tree is
`mmctx.train.config.RunConfig`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmctx.errors import ConfigError

M = TypeVar("M", bound="StrictModel")


class StrictModel(BaseModel):
    """Base of every config: unknown keys are errors, values are fixed once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def load_config(cls: type[M], path: str | Path, overrides: Sequence[str] = ()) -> M:
    """Reads ``path`` (YAML), applies ``overrides`` such as ``train.steps=100`` and validates the result.

    Values in overrides are parsed as YAML, so ``a.b=null``, ``a.b=[1, 2]`` and ``a.sources.0.weight=2`` work.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the nearest valid one is named) or a value is wrong.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return build_config(cls, tree, where=str(path))


def build_config(cls: type[M], tree: Mapping[str, Any], where: str) -> M:
    """Validates a plain ``tree`` as ``cls``; ``where`` names its origin in errors."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, tree, where, item) for item in error.errors())) from None


def dump_config(config: StrictModel, path: Path) -> None:
    """Writes the fully resolved config as YAML."""
    path.write_text(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` in a plain tree; numbers in the key index into lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                prefix = ".".join(parts[:depth])
                raise ConfigError(
                    f"override {override!r}: {prefix} is a list of {len(node)} items, {part!r} is none of them"
                )
            index: Any = int(part)
        else:
            index = part
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and not isinstance(node.get(index), dict | list):
            node[index] = {}
        node = node[index]


def _explain(cls: type[StrictModel], tree: Mapping[str, Any], where: str, item: Mapping[str, Any]) -> str:
    """One readable line for one pydantic error: file, dotted key, what was found, remedy."""
    keys, owner = _written_keys(tree, item)
    key = ".".join(map(str, keys))
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(cls, keys[:-1], owner.get("kind"))
        close = difflib.get_close_matches(str(keys[-1]), valid, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(sorted(valid))}"
        return f"{where}: unknown key {key!r}; {remedy}"
    if item["type"] == "missing":
        return f"{where}: key {key!r} is required and has no default"
    message = item["msg"].removeprefix("Value error, ")
    found = item.get("input")  # a whole branch of the tree would bury the message
    return f"{where}: key {key!r}: {message}" + (
        "" if isinstance(found, Mapping | StrictModel) else f" (got {found!r})"
    )


def _written_keys(tree: Mapping[str, Any], item: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The keys of an error as they stand in the file, and what holds the last of them.

    Pydantic's location also lists tags of unions, as in `objectives.NAME.similarity.pairs`: what the tree does not hold
    is a tag, unless it is the very key that is missing.
    """
    keys: list[Any] = []
    owner: Any = tree
    node: Any = tree
    for place, part in enumerate(item["loc"]):
        held = part in node if isinstance(node, Mapping) else isinstance(node, list | tuple) and isinstance(part, int)
        if held:
            keys.append(part)
            owner, node = node, node[part]
        elif item["type"] == "missing" and place == len(item["loc"]) - 1:
            keys.append(part)
            owner = node
    return keys, owner


def _valid_keys(cls: type[StrictModel], keys: Sequence[Any], kind: Any) -> list[str]:
    """Field names of the model that stands at `keys`; where several may, of the one of this `kind`, if there is one."""
    found: list[Any] = [cls]
    for key in keys:
        found = [below for annotation in found for below in _below(annotation, key)]
    models = [model for model in found if isinstance(model, type) and issubclass(model, BaseModel)]
    of_kind = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == kind]
    return [name for model in of_kind or models for name in model.model_fields]


def _below(annotation: Any, key: Any) -> list[Any]:
    """What may stand under `key` of a model, a dict or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _alternatives(annotation.model_fields[key].annotation) if key in annotation.model_fields else []
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        arguments = arguments[1:]
    return [found for argument in arguments for found in _alternatives(argument)]


def _alternatives(annotation: Any) -> list[Any]:
    """The members of `X | Y` and `Annotated[X | Y, ...]`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for part in typing.get_args(annotation) for found in _alternatives(part)]
    return [annotation]
