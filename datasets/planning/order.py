"""Pseudo-random orders in closed form: position -> sample, without ever holding the order.

An order is computed where it is asked, so seeking costs nothing and a billion samples need no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmctx.errors import ConfigError

_ROUNDS = 6  # four make a strong permutation of random functions (Luby and Rackoff 1988); two more for our light mixer


def derive_key(*parts: object) -> int:
    """A 64-bit key from (run seed, purpose, number, ...): how everything random in the data path is seeded."""
    text = "\x1f".join(str(part) for part in parts).encode("utf-8", "surrogateescape")  # keys of tars may be any bytes
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps (n,) int64 positions in `[0, size)` one to one onto `[0, size)`.

    A Feistel network over the smallest even number of bits that covers `size`; results outside are sent through again until they fall
    inside (cycle walking, Black and Rogaway 2002), four times at the worst on average.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(derive_key(key, number)) for number in range(_ROUNDS)]
    out = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: Sequence[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return left << shift | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """Order of one source: blocks of neighbours in random order, samples shuffled among the blocks in flight.

    Reading follows the blocks, so it stays mostly sequential on disk while a sample's company changes with every epoch.

    Attributes:
        size: number of samples.
        block_size: neighbours that travel together.
        in_flight: blocks whose samples are shuffled together.
        key: seeds the order; epochs are told apart by it.
    """

    size: int
    block_size: int
    in_flight: int
    key: int

    def ordinal(self, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Sample numbers (n,) at `positions` in `[0, size)` of each one's epoch."""
        out = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._one_epoch(positions[chosen], derive_key(self.key, int(epoch)))
        return out

    def _one_epoch(self, positions: np.ndarray, key: int) -> np.ndarray:
        group_size = self.block_size * self.in_flight
        shuffled = np.empty_like(positions)
        for group in np.unique(positions // group_size):
            inside = positions // group_size == group
            start = int(group) * group_size
            size = min(group_size, self.size - start)
            shuffled[inside] = start + permute(positions[inside] - start, size, derive_key(key, "group", int(group)))
        return self._block_order(shuffled, derive_key(key, "blocks"))

    def _block_order(self, places: np.ndarray, key: int) -> np.ndarray:
        """Samples at `places` when whole blocks are laid end to end in random order; the short last block stays last."""
        num_whole = self.size // self.block_size
        block, offset = places // self.block_size, places % self.block_size
        whole = block < num_whole
        block[whole] = permute(block[whole], num_whole, key)
        return block * self.block_size + offset


class Mixture:
    """Interleaves sources by weight in closed form: stream position -> (source, ordinal within it).

    Weights are rounded to a cycle of 4,096 draws, spread evenly over it; every source gets one of them at least.
    """

    CYCLE = 4096

    def __init__(self, weights: Sequence[float]) -> None:
        if len(weights) > self.CYCLE:
            raise ConfigError(
                f"data.sources: {len(weights)} sources with weights, at most {self.CYCLE}; join some of them"
            )
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights) * self.CYCLE
        counts = np.maximum(np.floor(share), 1).astype(np.int64)
        while counts.sum() < self.CYCLE:  # largest remainder
            counts[np.argmax(share - counts)] += 1
        while counts.sum() > self.CYCLE:
            counts[np.argmax(counts)] -= 1
        self.counts = counts
        source = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((number + 0.5) / counts[source], kind="stable")
        self._source, self._number = source[order], number[order]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source numbers (n,) and how many draws each source had before, (n,)."""
        cycle, place = positions // self.CYCLE, positions % self.CYCLE
        source = self._source[place]
        return source, cycle * self.counts[source] + self._number[place]

    def count(self, positions: int) -> np.ndarray:
        """How many of the first `positions` draws each source gets, (sources,) int64."""
        whole, rest = divmod(positions, self.CYCLE)
        return whole * self.counts + np.bincount(self._source[:rest], minlength=len(self.counts))
