"""Settings of single modules: learning rate, weight decay, and whether they are trained at all.

    train:
      modules:
        encoders.image: {lr_factor: 0.1}
        encoders.image.projector: {lr_factor: 1.0}
        trunk: {freeze: true}

Keys are dotted paths of modules of `MmctxModel`. Where several cover a parameter, the longest that says something counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field
from torch import nn

from mmctx.config import StrictModel
from mmctx.errors import ConfigError


class ModuleConfig(StrictModel):
    """What differs in one module and all below it; null is as in the module around it."""

    lr_factor: float | None = Field(default=None, ge=0)
    """Factor of the learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """In place of the optimizer's, on the same tensors."""
    freeze: bool | None = None
    """No gradients are computed for it and nothing of it changes; gradients still pass through to what comes before it."""


Modules = dict[str, ModuleConfig]


class _HasModules(Protocol):
    @property
    def modules(self) -> Modules: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`ModuleConfig` of one parameter, resolved; `weight_decay` None is the optimizer's."""

    lr_factor: float = 1.0
    weight_decay: float | None = None
    freeze: bool = False


def merged(base: Mapping[str, ModuleConfig], over: Mapping[str, ModuleConfig]) -> Modules:
    """The settings of `over` on top of those of `base`, field by field."""
    both = {path: base.get(path, ModuleConfig()) for path in [*base, *over]}
    for path, change in over.items():
        both[path] = both[path].model_copy(update=change.model_dump(exclude_none=True))
    return both


def owner(name: str, paths: Iterable[str]) -> str:
    """The longest of `paths` that the parameter (or module) `name` lies in; "" if none."""
    return max((path for path in paths if covers(path, name)), key=len, default="")


def covers(path: str, name: str) -> bool:
    """Whether `name` is `path` or lies below it."""
    return name == path or name.startswith(f"{path}.")


def settings_of(name: str, modules: Mapping[str, ModuleConfig]) -> Settings:
    """What holds for the parameter `name`: the modules around it from the outermost inwards, each over the one before."""
    found: dict[str, float | bool] = {}
    for path in sorted(filter(lambda path: covers(path, name), modules), key=len):
        found |= modules[path].model_dump(exclude_none=True)
    return Settings(**found)  # type: ignore[arg-type]


def in_force(modules: Mapping[str, ModuleConfig], frozen: Mapping[str, bool]) -> Modules:
    """The settings of a run or stage over what is frozen, by path, where they say nothing of it."""
    return merged({path: ModuleConfig(freeze=freeze) for path, freeze in frozen.items()}, modules)


def check_modules(
    model: nn.Module, modules: Mapping[str, ModuleConfig], where: str, frozen: Mapping[str, bool] | None = None
) -> None:
    """Looks whether every path is a module of the model.

    Args:
        model: that they are of.
        modules: by path.
        where: they are written, for errors.
        frozen: what is unless they say otherwise.

    Raises:
        ConfigError: one is not, or nothing is left to train.
    """
    known = [name for name, _ in model.named_modules() if name]
    for path in modules:
        if path not in known:
            raise ConfigError(f"{where}: the model has no module {path!r}; {_remedy(path, known)}")
    names = [name for name, _ in model.named_parameters()]
    if names and all(settings_of(name, in_force(modules, frozen or {})).freeze for name in names):
        raise ConfigError(f"{where}: every parameter is frozen, so there is nothing to train; unfreeze a module")


def named_in(trains: Iterable[_HasModules]) -> list[str]:
    """All paths that some stage names, given `TrainConfig` of each."""
    return sorted({path for train in trains for path in train.modules})


def _remedy(path: str, known: Sequence[str]) -> str:
    parent = owner(path, known)
    depth = parent.count(".") + 1 if parent else 0
    inside = [name for name in known if name.count(".") == depth and (not parent or covers(parent, name))]
    close = difflib.get_close_matches(path, known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}{f'{parent} has' if parent else 'there are'} {', '.join(inside) or 'no modules of its own'}"


def freeze(model: nn.Module, modules: Mapping[str, ModuleConfig]) -> bool:
    """Lets the parameters of frozen modules ask for no gradient, and all others for one; returns whether that changed anything."""
    changed = False
    for name, parameter in model.named_parameters():
        trained = not settings_of(name, modules).freeze
        if trained != parameter.requires_grad:
            parameter.requires_grad_(trained)
            parameter.grad = None
            changed = True
    return changed
