"""Suite `passkey`: a number that is hidden in a document of L tokens and asked at its end (Mohtashami and Jaggi 2023).

An answer is exact if its first integer is the pass key.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mmctx.eval.context import EvalContext
from mmctx.eval.haystack.config import PasskeyConfig
from mmctx.eval.haystack.grid import Kind, run_grid
from mmctx.eval.haystack.probe import Needle, Probe, ranked
from mmctx.eval.haystack.sources import open_haystack
from mmctx.eval.haystack.words import numbers


def evaluate_passkey(context: EvalContext) -> dict[str, Any]:
    """See `mmctx.eval.haystack.grid.run_grid`; its one kind is `passkey`. Empty where no held-out source serves captioning."""
    config = context.config.passkey
    for objective in context.names("captioning")[:1]:
        kinds = {"passkey": Kind(functools.partial(make_passkey, config), "first_integer")}
        haystack = open_haystack(config.haystack, context.data.only(objective))
        return run_grid(context, "passkey", config, kinds, haystack)
    return {}


def make_passkey(config: PasskeyConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """A pass key at a depth."""
    depth = depth or 0.0
    values = numbers(rng, config.candidates, config.digits)
    number = f" {values[0]}"
    needle = Needle((" The pass key is", number, ". Remember it.", number, " is the pass key."), depth)
    question = " What is the pass key? The pass key is"
    choice = ranked(values, values[:1], rng)
    return Probe("passkey", (needle,), (question,), (choice,), (values[0],), (depth,), (number,))
