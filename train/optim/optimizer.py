"""The optimizer of a run: its groups, and how each kind is made.

Whatever the kind, it is one `torch.optim.Optimizer` that holds from the start every parameter that some stage trains: those without a
gradient at the time (frozen ones) are skipped and take no state. The moments are its only state, with AdaLoRA's means; all else in its
groups comes from the configuration, also after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmctx.errors import ConfigError
from mmctx.train.optim.config import AdafactorConfig, AdamWConfig, MuonConfig, OptimizerConfig
from mmctx.train.optim.modules import Modules, owner, settings_of

Group = dict[str, Any]
_MIN_MUON = "2.9"  # the first torch with torch.optim.Muon


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, paths: Iterable[str] = (), never: Collection[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer over the parameters of a model, decay on matrices only: not on norms, biases, embeddings and learned scales.

    Args:
        model: whose parameters.
        config: of the optimizer.
        paths: of modules that have settings of their own at some time of the run: each makes groups of its own.
        never: names of parameters that are never trained.

    Raises:
        ConfigError: this torch has no such optimizer.
    """
    return _KINDS[type(config)](list(_groups(model, tuple(paths), config, frozenset(never))), config)


def _groups(
    model: nn.Module, paths: tuple[str, ...], config: OptimizerConfig, never: frozenset[str]
) -> Iterator[Group]:
    """Parameters that share all settings, with their names, in the model's order."""
    decayed, orthogonal = decayed_parameters(model), _muon_matrices(model)
    groups: dict[tuple[str, bool, bool], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if name in never:
            continue
        kind = (owner(name, paths), name in decayed, isinstance(config, MuonConfig) and name in orthogonal)
        groups.setdefault(kind, []).append((name, parameter))
    for (path, decays, is_muon), parameters in groups.items():
        decay = config.weight_decay if decays else 0.0
        yield {"params": parameters, "weight_decay": decay, "path": path, "decays": decays, "muon": is_muon}


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of what weight decay pulls to zero: tensors of two and more dimensions, but for embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in embeddings}


def _muon_matrices(model: nn.Module) -> set[str]:
    """Names of the linear layers' weights in trunk and encoders: not of heads, embeddings and convolutions."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path.startswith(("trunk.", "encoders."))
        for name in {nn.Linear: ("weight",), nn.MultiheadAttention: ("in_proj_weight",)}.get(_matrix_kind(module), ())
        if getattr(module, name, None) is not None
    }


def _matrix_kind(module: nn.Module) -> type[nn.Module]:
    return next((kind for kind in (nn.Linear, nn.MultiheadAttention) if isinstance(module, kind)), type(module))


def set_groups(optimizer: torch.optim.Optimizer, config: OptimizerConfig, modules: Modules, lr: float) -> None:
    """Learning rate and weight decay of every group for the step to come."""
    for group in optimizer.param_groups:
        settings = settings_of(group["path"], modules)
        decay = config.weight_decay if settings.weight_decay is None else settings.weight_decay
        group["lr"] = lr * settings.lr_factor
        group["weight_decay"] = decay if group["decays"] else 0.0


def _adamw(groups: list[Group], config: AdamWConfig) -> torch.optim.Optimizer:
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    return torch.optim.AdamW(groups, **options, fused=True if _can_fuse(groups) else None)


def _can_fuse(groups: list[Group]) -> bool:
    tensors = [tensor for group in groups for _, tensor in group["params"]]
    return all(t.is_floating_point() and t.device.type in ("cpu", "cuda", "mps", "xpu") for t in tensors)


def _adafactor(groups: list[Group], config: AdafactorConfig) -> torch.optim.Optimizer:
    eps = (None, config.min_scale)
    return torch.optim.Adafactor(
        groups, lr=config.lr, beta2_decay=config.beta2_decay, eps=eps, d=config.clip_update, foreach=True
    )


def _muon(groups: list[Group], config: MuonConfig) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"train.optimizer.kind=muon: torch {torch.__version__} has no Muon; install torch >= {_MIN_MUON}, or use adamw"
        )
    matrices, rest = ([group for group in groups if group["muon"] is is_muon] for is_muon in (True, False))
    parts: dict[bool, torch.optim.Optimizer] = {}
    if matrices:
        options = {"momentum": config.momentum, "nesterov": config.nesterov, "adjust_lr_fn": config.adjust}
        parts[True] = torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, **options)
    if rest:
        parts[False] = _adamw(rest, config)
    return MuonAndAdamW(parts)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that behave as one: one list of groups, one state. A group's key `muon` says whose it is."""

    def __init__(self, parts: dict[bool, torch.optim.Optimizer]) -> None:
        self._parts = parts
        super().__init__([group for part in parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; `found_inf` goes to AdamW, Muon knows none."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, part in self._parts.items():  # loading a state puts new groups and a new state in place
            part.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]
            part.state = self.state
            part.step()
        return loss


_KINDS: dict[type[OptimizerConfig], Callable[..., torch.optim.Optimizer]] = {
    AdamWConfig: _adamw,
    AdafactorConfig: _adafactor,
    MuonConfig: _muon,
}


def state_shapes(model: nn.Module, config: OptimizerConfig) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors that the optimizer keeps of what is trained, once it has taken a step."""
    orthogonal = _muon_matrices(model)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            continue
        if isinstance(config, AdafactorConfig) and len(shape) > 1:
            yield from ((*shape[:-1], 1), (*shape[:-2], 1, shape[-1]))
        elif isinstance(config, AdafactorConfig) or (isinstance(config, MuonConfig) and name in orthogonal):
            yield shape
        else:
            yield from (shape, shape)


TAKES_FOUND_INF = (torch.optim.AdamW,)
"""Optimizers that leave a step out by a tensor `found_inf` on the device, if they are fused: nobody waits for its value."""
