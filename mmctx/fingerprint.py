"""A name for what the model is fed, by which runs on other machines, ranks and workers can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from mmctx.pack import PackedBatch

_WORD = 1 << 64


def bin_fingerprint(number: int, batch: PackedBatch) -> int:
    """64 bits that name a bin's place in its step and all it holds: ids, labels, boundaries, objectives, media, pooled positions,
    pairs.

    Reads host memory: call it before the batch goes to a device.
    """
    digest = hashlib.blake2b(digest_size=8)
    layout = batch.layout
    about = (number, layout.lengths, layout.num_causal, batch.objectives, sorted(batch.pairs.items()))
    means = [(name, sizes) for name, sizes in sorted(batch.pool_sizes.items()) if any(size != 1 for size in sizes)]
    digest.update(repr((*about, means) if means else about).encode())  # words on record know no means
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        _update(digest, tensor)
    for name, positions in sorted(batch.pooled.items()):
        digest.update(name.encode())
        _update(digest, positions)
    for kind, media in sorted(batch.media.items()):
        about = (kind, media.lengths, media.num_tokens)
        digest.update(repr((*about, media.sizes) if media.sizes else about).encode())
        for tensor in (media.values, media.slots, media.rows):
            _update(digest, tensor)
    return int.from_bytes(digest.digest(), "little")


def combine(fingerprints: Iterable[int]) -> int:
    """The fingerprint of a global batch from those of its bins, or of the parts that ranks hold: a sum, so that no order matters."""
    return sum(fingerprints) % _WORD


def show(fingerprint: int) -> str:
    """16 hexadecimal digits, as in `metrics.jsonl`."""
    return f"{fingerprint % _WORD:016x}"


def as_signed(fingerprint: int) -> int:
    """The same 64 bits as an int64, whose sums over ranks wrap around as `combine` does."""
    return fingerprint - _WORD if fingerprint >= _WORD // 2 else fingerprint


def _update(digest, tensor: torch.Tensor) -> None:
    digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    digest.update(np.ascontiguousarray(tensor.numpy()))
