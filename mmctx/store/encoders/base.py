"""What an encoder is to a store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import ConfigError
from mmctx.store.entries import Kind
from mmctx.store.provenance import Provenance

BATCH = 32
"""Items of one kind that a library's model takes at a time."""


class Encoder(Protocol):
    """Turns texts, pictures and clips into unit vectors of one space.

    Attributes:
        provenance: its name, fingerprint, size and the kinds that it knows.
    """

    provenance: Provenance

    def prepare(self, kind: Kind, value: str | bytes) -> Any:
        """A text, or the bytes of a picture or clip, decoded; only of kinds that it knows.

        Raises:
            SampleError: it cannot be decoded.
        """
        ...

    def embed(self, prepared: Sequence[Any]) -> np.ndarray:
        """(n, E) float32 unit vectors of what `prepare` gave, in the same order."""
        ...


def unit(vectors: Tensor) -> np.ndarray:
    """(n, E) of any length -> float32 of length 1, on the host."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


def by_kind(
    prepared: Sequence[tuple[Kind, Any]], functions: dict[Kind, Callable[[list[Any]], Tensor]], dim: int
) -> np.ndarray:
    """(n, E): each kind by its own function from up to `BATCH` items to (b, E), in the order of `prepared`."""
    vectors = np.zeros((len(prepared), dim), np.float32)
    for kind, function in functions.items():
        mine = [number for number, (own, _) in enumerate(prepared) if own == kind]
        for start in range(0, len(mine), BATCH):
            some = mine[start : start + BATCH]
            with torch.inference_mode():
                vectors[some] = unit(function([prepared[number][1] for number in some]))
    return vectors


def fingerprint_files(paths: Iterable[Path], about: str = "") -> str:
    """16 hexadecimal digits that name the bytes of some files, and whatever else the vectors depend on.

    Raises:
        ConfigError: there are none.
    """
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    found = sorted(paths)
    if not found:
        raise ConfigError(f"an encoder without files to tell it by ({about}); name a folder or file with its weights")
    for path in found:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
