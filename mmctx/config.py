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
        tree = yaml.safe_load(path.read_text())
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
        raise ConfigError("\n".join(_explain(cls, where, item) for item in error.errors())) from None


def dump_config(config: StrictModel, path: Path) -> None:
    """Writes the fully resolved config as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


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


def _explain(cls: type[StrictModel], where: str, item: Mapping[str, Any]) -> str:
    """One readable line for one pydantic error: file, dotted key, what was found, remedy."""
    location = item["loc"]
    key = ".".join(_written_keys(cls, location))
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(cls, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(sorted(valid))}"
        return f"{where}: unknown key {key!r}; {remedy}"
    if item["type"] == "missing":
        return f"{where}: key {key!r} is required and has no default"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: key {key!r}: {message} (got {item.get('input')!r})"


def _written_keys(cls: type[StrictModel], location: Sequence[Any]) -> list[str]:
    """The keys as they stand in the file: pydantic also lists the tag of a discriminated union, behind the key of its value."""
    written: list[str] = []
    candidates: list[Any] = [cls]
    for part in location:
        models = [
            candidate for candidate in candidates if isinstance(candidate, type) and issubclass(candidate, BaseModel)
        ]
        kinds = [
            model for model in models if "kind" in model.model_fields and model.model_fields["kind"].default == part
        ]
        if len(models) > 1 and kinds:
            candidates = kinds
            continue
        written.append(str(part))
        fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        candidates = [found for annotation in fields for found in _unwrap(annotation)] or candidates
    return written


def _valid_keys(cls: type[StrictModel], location: Sequence[Any]) -> list[str]:
    """Field names of every model that may stand at ``location``, walking through lists, dicts and unions."""
    candidates: list[Any] = [cls]
    for part in location:
        step: list[Any] = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                if part in candidate.model_fields:
                    step.extend(_unwrap(candidate.model_fields[part].annotation))
                else:  # pydantic puts the tag of a discriminated union into the location: stay where we are
                    step.append(candidate)
        candidates = step or candidates
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return [name for model in models for name in model.model_fields]


def _unwrap(annotation: Any) -> list[Any]:
    """The classes inside ``X | None``, ``list[X]``, ``dict[str, X]`` and ``Annotated[X, ...]``."""
    origin = typing.get_origin(annotation)
    if origin is None:
        return [annotation]
    if origin is typing.Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, list, tuple, dict):
        return [found for part in typing.get_args(annotation) for found in _unwrap(part)]
    return []
