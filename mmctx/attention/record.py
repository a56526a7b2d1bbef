"""The certificate of a machine, as `mmctx doctor` leaves it for later runs.

    $XDG_CACHE_HOME/mmctx/attention/DEVICE.json      ~/.cache/mmctx/... where that is not set

It holds for one device, one PyTorch, one set of kernel packages and one state of mmctx's attention code. Any other is
ignored with a warning: a kernel that was right yesterday may be another one today.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import time
import uuid
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import ValidationError

from mmctx.attention.choice import Choice, Crossover
from mmctx.config import StrictModel
from mmctx.user_cache import installed_version, user_cache

_PACKAGES = ("flash-attn", "flash-attn-4", "triton", "nvidia-cutlass-dsl")
_WINDOWED = "window"  # the profile of lengths that was timed under a window


class Entry(StrictModel):
    """What was found about one backend that can run here, with one type."""

    backend: str
    """Its name."""
    dtype: str
    """Such as bfloat16."""
    passed: bool
    """Every error lies within the tolerance."""
    same_bits: bool | None
    """Backward passes gave the same bits each time; null where that was not tried."""
    milliseconds: dict[str, float]
    """Forward and backward, by profile of lengths; empty where it failed."""


class CrossoverEntry(StrictModel):
    """See `choice.Crossover`."""

    short: str
    """Backend of the shorter documents."""
    causal: int | None
    """Tokens."""
    bidirectional: int | None
    """Tokens."""


class Record(StrictModel):
    """One certificate file."""

    machine: dict[str, str | None]
    """What it holds for, see `describe_machine`."""
    made: str
    """When, in UTC."""
    entries: list[Entry]
    """Of every backend that says that it can run here."""
    crossover: CrossoverEntry | None = None
    """Of the hybrid backend."""

    def choice(self) -> Choice:
        """What "auto" makes of it. A backend that is wrong in one type is not trusted in another."""
        failed = frozenset(entry.backend for entry in self.entries if not entry.passed)
        times = []
        for entry in self.entries:
            windowed = [ms for profile, ms in entry.milliseconds.items() if profile == _WINDOWED]
            plain = [ms for profile, ms in entry.milliseconds.items() if profile != _WINDOWED]
            for is_windowed, found in ((True, windowed), (False, plain)):
                if found:
                    times.append((entry.backend, entry.dtype, is_windowed, _geometric_mean(found)))
        return Choice(
            times=tuple(times),
            failed=failed,
            unsteady=frozenset(entry.backend for entry in self.entries if entry.same_bits is False),
            crossover=self.crossover and Crossover(**self.crossover.model_dump()),
            source=f"the certificate of {self.made}",
        )


def _geometric_mean(numbers: list[float]) -> float:
    """No profile outweighs the others only because its batches take longer."""
    return math.exp(sum(math.log(number) for number in numbers) / len(numbers))


def describe_machine(device: torch.device) -> dict[str, str | None]:
    """All that a certificate depends on: the device, the versions of what computes, and mmctx's own code."""
    on_gpu = device.type == "cuda"
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else None,
        **{package: installed_version(package) if on_gpu else None for package in _PACKAGES},
        "code": _code_hash(),
    }


def record_path(device: torch.device) -> Path:
    """Where the certificate of a device lies; machines that share a home each have their own."""
    name = re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")
    return user_cache() / "attention" / f"{device.type}-{name}.json"


def save_record(record: Record, device: torch.device) -> Path:
    """Writes a certificate in place of the device's earlier one; a reader sees one of them, whole.

    Raises:
        OSError: the cache cannot be written.
    """
    path = record_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}")
    part.write_text(json.dumps(record.model_dump(mode="json"), indent=2))
    os.replace(part, path)
    return path


def load_record(device: torch.device) -> Record | None:
    """The certificate of a device; None, with one warning, where it is damaged or of another state of the machine."""
    path = record_path(device)
    try:
        record = Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        problem = str(error).splitlines()[0]
        warnings.warn(f"{path}: ignored, not a certificate ({problem}); `mmctx doctor` makes a new one", stacklevel=2)
        return None
    here = describe_machine(device)
    for name in here | record.machine:
        if here.get(name) != record.machine.get(name):
            warnings.warn(
                f"{path}: ignored, it is of {name} {record.machine.get(name)}, here is {here.get(name)}; "
                "`mmctx doctor` makes a new one",
                stacklevel=2,
            )
            return None
    return record


def utc_now() -> str:
    """For `Record.made`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@lru_cache
def _code_hash() -> str:
    """Of the code that computes attention, whoever changed it."""
    folder = Path(__file__).parent
    content = hashlib.sha256()
    for path in [*sorted(folder.glob("*.py")), folder.parent / "layout.py"]:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]
