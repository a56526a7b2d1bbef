"""How fast backends are on this machine, by profiles of document lengths.

Lengths differ from one measurement to the next, as they do in training: a backend that has to compile or plan for every
new length shows it.

Shapes: T tokens of one batch.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmctx.attention.backend import AttentionFunction
from mmctx.attention.cases import make_inputs
from mmctx.attention.choice import Crossover
from mmctx.layout import DocumentLayout


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of batch.

    Attributes:
        parts: (share of the batch, typical length) of each kind of document, both as fractions of T.
        causal: share of the documents of each kind that attend causally.
        window: as a fraction of T, None for full attention.
    """

    parts: tuple[tuple[float, float], ...]
    causal: float = 1.0
    window: float | None = None


PROFILES: dict[str, Profile] = {
    "short": Profile(parts=((1.0, 1 / 128),)),
    "mixed": Profile(parts=((0.25, 1 / 4), (0.25, 1 / 16), (0.5, 1 / 64)), causal=0.5),
    "long": Profile(parts=((1.0, 1.0),)),
    "window": Profile(parts=((0.75, 3 / 4), (0.25, 1 / 16)), window=1 / 32),
}
"""Profiles by name. 32,768 tokens on a GPU, so that "short" documents have about 256; 1,024 on a CPU, where they have 8."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Size of a timed batch: T, and the shape of its heads."""

    tokens: int
    num_heads: int
    head_dim: int


SCALES = {
    "cuda": Scale(tokens=32_768, num_heads=16, head_dim=128),
    "cpu": Scale(tokens=1_024, num_heads=4, head_dim=64),
}


def draw_lengths(profile: Profile, tokens: int, seed: int) -> tuple[list[int], int]:
    """Lengths of about half to one and a half times their profile's that sum to `tokens`, causal ones first, and their count."""
    rng = random.Random(seed)
    causal, both = [], []
    for share, typical in profile.parts:
        left = round(share * tokens)
        number = 0
        while left > 0:
            length = min(left, max(1, round(typical * tokens * rng.uniform(0.5, 1.5))))
            (causal if number < profile.causal * share / typical else both).append(length)
            left -= length
            number += 1
    return [*causal, *both], len(causal)


def time_backend(
    function: AttentionFunction, device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> dict[str, float]:
    """Median milliseconds, forward and backward, of each profile."""
    scale = SCALES.get(device.type, SCALES["cpu"])
    found = {}
    for name, profile in PROFILES.items():
        window = None if profile.window is None else max(1, round(profile.window * scale.tokens))
        layouts = [draw_lengths(profile, scale.tokens, seed) for seed in range(repeats + 2)]
        found[name] = _median(function, layouts, window, scale, device, dtype)
    return found


def measure_crossover(
    long: AttentionFunction,
    short: AttentionFunction,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16_384, 32_768),
) -> Crossover:
    """From which document length on `long`, called once a document, is faster than `short`, called `name`, on all together."""
    scale = SCALES.get(device.type, SCALES["cpu"])

    def milliseconds(function: AttentionFunction, length: int, causal: bool) -> float:
        count = max(1, lengths[-1] // length)
        layouts = []
        for repeat in range(5):  # a little shorter each time: a plan for one length alone must not look good
            documents = [max(1, length - 8 * repeat)] * count
            layouts.append((documents, count if causal else 0))
        return _median(function, layouts, None, scale, device, dtype)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, window: int | None) -> Tensor:
        documents = zip(*(x.split(layout.lengths) for x in (q, k, v)), layout.lengths, strict=True)
        causal = int(layout.num_causal > 0)
        own = [(q, k, v, DocumentLayout.from_lengths((length,), causal, device)) for q, k, v, length in documents]
        return torch.cat([long(q, k, v, alone, window) for q, k, v, alone in own])

    found = {}
    for causal in (True, False):
        ours = [milliseconds(one_by_one, length, causal) for length in lengths]
        theirs = [milliseconds(short, length, causal) for length in lengths]
        found[causal] = first_that_stays_faster(lengths, ours, theirs)
    return Crossover(short=name, causal=found[True], bidirectional=found[False])


def first_that_stays_faster(lengths: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> int | None:
    """The smallest length from which on `ours` is below `theirs` at every length measured, None if there is none."""
    crossover = None
    for length, mine, other in reversed(list(zip(lengths, ours, theirs, strict=True))):
        if mine >= other:
            break
        crossover = length
    return crossover


def _median(
    function: AttentionFunction,
    layouts: Sequence[tuple[Sequence[int], int]],
    window: int | None,
    scale: Scale,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Of all layouts but the first two, which compile and warm up."""
    wait: Callable[[], None] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    times = []
    for lengths, num_causal in layouts:
        layout = DocumentLayout.from_lengths(lengths, num_causal, device)
        q, k, v, grad = make_inputs(layout, scale.num_heads, scale.num_heads, scale.head_dim, dtype)
        wait()
        start = time.perf_counter()
        torch.autograd.grad(function(q, k, v, layout, window), (q, k, v), grad)
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])
