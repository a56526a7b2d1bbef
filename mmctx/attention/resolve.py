"""One choice of attention backends for all ranks of a run.

Hosts may hold different certificates, or lack a package: ranks that chose by themselves could compute differently. So
the first rank's certificate holds for all, and only what every rank can use is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmctx.attention import BACKENDS, Request, usable_backends
from mmctx.attention.choice import Choice, certified_choice, using
from mmctx.errors import ConfigError

Gather = Callable[[Any], Sequence[Any]]
"""Takes one rank's object, gives those of all ranks in their order; a collective call."""

_KEY = "model.transformer.attention"


@dataclass(frozen=True, slots=True)
class Resolution:
    """What `resolve` found.

    Attributes:
        choice: for `mmctx.attention.choice.using`, equal on every rank.
        backends: the backend of each kind of layer that was asked about.
    """

    choice: Choice
    backends: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """For the manifest of a run."""
        crossover = self.choice.crossover if "hybrid" in self.backends.values() else None
        return {
            "backends": self.backends,
            "by": self.choice.source,
            "failed": sorted(self.choice.failed),
            "crossover": crossover and asdict(crossover),
        }

    def describe(self, deterministic: bool) -> str:
        """One line for people."""
        names = sorted(set(self.backends.values()))
        shown = names[0] if len(names) == 1 else ", ".join(f"{k}: {name}" for k, name in self.backends.items())
        note = ", deterministic" if deterministic else ""
        failed = [f"WARNING: {name} failed certification here" for name in names if name in self.choice.failed]
        return "; ".join([f"attention: {shown}{note}, by {self.choice.source}", *failed])


def resolve(
    name: str,
    requests: Mapping[str, Request],
    gather: Gather = lambda own: [own],
    is_first: bool = True,
) -> Resolution:
    """Settles on a backend for every kind of layer; all ranks call it together and all get the same, or the same error.

    Args:
        name: what the configuration asks for: "auto" or a backend.
        requests: the run's kinds of layers and what each asks of a backend, such as "global" and "local".
        gather: how ranks tell each other; a single process needs none.
        is_first: whether this is the rank whose certificate holds.

    Raises:
        ConfigError: `name` is unknown or cannot serve the requests on some rank, or "auto" finds none that all can use.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"{_KEY}: unknown attention backend {name!r}; use auto or one of {', '.join(BACKENDS)}")
    device = next(iter(requests.values())).device
    choice: Choice = gather(certified_choice(device) if is_first else None)[0]
    if name == "auto":
        return _resolve_auto(requests, choice, gather)
    with using(choice):
        reason = next((r for request in requests.values() if (r := _why_not(name, request))), None)
    for rank, found in enumerate(gather(reason)):
        if found is not None:
            raise ConfigError(f"{_KEY}={name}: it cannot be used on rank {rank}: {found}")
    return Resolution(choice, dict.fromkeys(requests, name))


def _why_not(name: str, request: Request) -> str | None:
    reason = BACKENDS[name].why_not(request)
    if reason is None:
        return None
    if request.deterministic and BACKENDS[name].why_not(replace(request, deterministic=False)) is None:
        return f"train.deterministic is true, but {reason}; or set {_KEY}=auto, or train.deterministic=false"
    return f"{reason}; or set {_KEY}=auto, `mmctx doctor` shows what can run"


def _resolve_auto(requests: Mapping[str, Request], choice: Choice, gather: Gather) -> Resolution:
    with using(choice):
        mine = {kind: usable_backends(request) for kind, request in requests.items()}
    everyone = gather(mine)
    everywhere = [name for name in BACKENDS if all(_has_some_use(name, found) for found in everyone)]
    backends = {}
    for kind in requests:
        first, _ = everyone[0][kind]
        common = [name for name in first if all(name in found[kind][0] for found in everyone)]
        if not common:
            reasons = [
                f"rank {rank}: {name}: {r}" for rank, found in enumerate(everyone) for name, r in found[kind][1].items()
            ]
            raise ConfigError(f"{_KEY}=auto: no backend can serve {kind} layers on every rank: {'; '.join(reasons)}")
        backends[kind] = common[0]
    return Resolution(replace(choice, allowed=frozenset(everywhere)), backends)


def _has_some_use(name: str, found: Mapping[str, tuple[list[str], Mapping[str, str]]]) -> bool:
    return any(name in usable for usable, _ in found.values())
