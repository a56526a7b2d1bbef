"""Models whose answers are known, through the calls that suites make: `prefill`, `branch`, `step` and `next_token_logits`.

Hidden states are logits. Where a model knows nothing it guesses: what it says hangs on the tokens before, as noise does.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmctx.eval.context import EvalContext
from mmctx.eval.haystack.config import GridConfig
from mmctx.eval.haystack.grid import Ask, build_asked, plan_kind
from mmctx.eval.haystack.material import named_media
from mmctx.eval.haystack.probe import Speller
from mmctx.eval.haystack.sources import open_haystack
from mmctx.eval.suites.needle import make_kind
from mmctx.pack import PackedBatch

SURE = 30.0


class Reader(nn.Module):
    """Keeps what it has read; `say` makes logits (V,) of a sequence of tokens, media known by their values."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def say(self, prompt: list[Any], written: tuple[int, ...]) -> np.ndarray:
        raise NotImplementedError

    def prefill(self, prompts: PackedBatch, cache: Any) -> Tensor:
        keys: list[Any] = prompts.input_ids.tolist()
        for media in prompts.media.values():
            items = np.repeat(np.arange(len(media.num_tokens)), media.num_tokens)
            values = media.values.split(media.lengths)
            for slot, row in zip(media.slots.tolist(), media.rows.tolist(), strict=True):
                keys[slot] = self.key(values[items[row]])
        ends = np.cumsum([0, *prompts.layout.lengths])
        cache.prompts = [keys[a:b] for a, b in itertools.pairwise(ends)]
        cache.written = [()] * len(cache.prompts)
        return self._logits((prompt, ()) for prompt in cache.prompts)

    def branch(self, continuations: Sequence[Tensor], cache: Any, row: int) -> Tensor:
        written = [tuple(part[: n + 1].tolist()) for part in continuations for n in range(len(part))]
        return self._logits((cache.prompts[row], one) for one in written)

    def step(self, input_ids: Tensor, cache: Any) -> Tensor:
        cache.written = [(*w, token) for w, token in zip(cache.written, input_ids.tolist(), strict=True)]
        return self._logits(zip(cache.prompts, cache.written, strict=True))

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def key(self, media: Tensor) -> int:
        return self.vocab_size + zlib.crc32(media.numpy().tobytes())

    def _logits(self, sequences: Iterable[tuple[list[Any], tuple[int, ...]]]) -> Tensor:
        return torch.from_numpy(np.stack([self.say(*sequence) for sequence in sequences])).float()

    def noise(self, prompt: list[Any], written: tuple[int, ...]) -> np.ndarray:
        seed = hash((*prompt[-32:], *prompt[:8], len(prompt), *written)) % (1 << 63)
        return np.random.default_rng(seed).random(self.vocab_size)


class Blind(Reader):
    """Gives every token the same probability."""

    def say(self, prompt: list[Any], written: tuple[int, ...]) -> np.ndarray:
        return np.zeros(self.vocab_size)


class Copier(Reader):
    """Copies what followed the longest earlier stretch that is equal to the last tokens, at most `reach` tokens back.

    It knows nothing of the suites: what it answers stands in the document, behind the words that the question ends with.
    """

    def __init__(self, vocab_size: int, reach: float = math.inf) -> None:
        super().__init__(vocab_size)
        self.reach = reach

    def say(self, prompt: list[Any], written: tuple[int, ...]) -> np.ndarray:
        read = [*prompt, *written]
        end, logits = len(read), self.noise(prompt, written)
        longest, following = 2, None
        for place in range(end - 2, -1, -1):  # the nearest first
            if read[place] != read[-1] or end - 1 - place > self.reach:
                continue
            length = 1
            while length <= place and length < 64 and read[place - length] == read[end - 1 - length]:
                length += 1
            if length > longest and read[place + 1] < self.vocab_size:
                longest, following = length, read[place + 1]
        if following is not None:
            logits[following] += SURE
        return logits


class Knowing(Reader):
    """Knows every question of a grid and its answers, as long as all that is asked stands at most `reach` tokens back."""

    def __init__(self, context: EvalContext, reach: float = math.inf) -> None:
        super().__init__(len(context.data.tokenizer))
        self.eos_id = context.data.tokenizer.eos_id
        self.answers: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        speller = Speller(context.data.tokenizer)
        for config, asks, haystack in planned(context, speller):
            for ask in asks:
                document, starts = build_asked(config, ask, haystack, speller)
                asked = [needle.asked for needle in ask.probe.needles if needle.asked or ask.control is None]
                far = [at for at, is_asked in zip(starts, asked, strict=False) if is_asked]
                if ask.control == "removed" or len(document.input_ids) - min(far, default=0) > reach:
                    continue
                whole = tuple(speller.join(ask.probe.answer).tolist())
                parts = [tuple(speller.ids(c.candidates[n]).tolist()) for c in ask.probe.choices for n in c.right]
                read = document.input_ids.tolist()
                for at, item in document.media:
                    read[at : at + item.num_tokens] = [self.key(item.values)] * item.num_tokens
                self.answers[tuple(read)] = [whole, *parts]

    def say(self, prompt: list[Any], written: tuple[int, ...]) -> np.ndarray:
        logits = self.noise(prompt, written)
        whole, *parts = self.answers.get(tuple(prompt), [()])
        for answer in parts:
            if answer[: len(written)] == written and len(answer) > len(written):
                logits[answer[len(written)]] = SURE
        if whole and whole[: len(written)] == written:
            logits[whole[len(written)] if len(whole) > len(written) else self.eos_id] += 2
        return logits


def planned(context: EvalContext, speller: Speller) -> Iterable[tuple[GridConfig, list[Ask], Any]]:
    """All documents that the suites `needle`, `passkey` and `world` ask, with their configuration and haystack."""
    from functools import partial

    from mmctx.eval.haystack.grid import Kind
    from mmctx.eval.haystack.probe import Lacking
    from mmctx.eval.suites.passkey import make_passkey
    from mmctx.eval.suites.world import make_world

    data = context.data.only("captioning")
    needle, passkey, world = context.config.needle, context.config.passkey, context.config.world
    media = named_media(data, needle.sources, needle.media)
    suites = {
        "needle": (needle, {kind: make_kind(kind, needle, media) for kind in needle.kinds}),
        "passkey": (passkey, {"passkey": Kind(partial(make_passkey, passkey), "first_integer")}),
        "world": (world, {task: Kind(partial(make_world, task, world), "labels", False) for task in world.tasks}),
    }
    for suite, (config, kinds) in suites.items():
        lengths = config.resolved_lengths(data.config.context_length)
        for name, kind in kinds.items():
            try:
                asks, _ = plan_kind(suite, name, kind, config, lengths, speller)
            except Lacking:
                continue
            yield config, asks, open_haystack(config.haystack, data)
