"""Documents that are one long list of words, of which the commonest are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

_ALONE = 4
"""How often each asked word comes in the control without others."""


class WordList(NamedTuple):
    """Words and how often they come.

    Attributes:
        shares: of each word, in falling order; they add up to 1.
        asked: the words that are asked for, all of them commoner than those that are not, but for `noise`.
        noise: words that are common and known not to be meant.
    """

    shares: Mapping[str, float]
    asked: tuple[str, ...]
    noise: tuple[str, ...] = ()

    def least_words(self) -> int:
        """The shortest list in which every asked word comes at least once more often than any other."""
        number = len(self.shares)
        while not self._is_clear(self._counts(number)):
            number += 1
        return number

    def least_tokens(self, cost: Callable[[str], int]) -> int:
        """Tokens of that list."""
        counts = self._counts(self.least_words())
        return sum(count * cost(word) for word, count in counts.items())

    def drawn(self, room: int, cost: Callable[[str], int], rng: np.random.Generator) -> list[str]:
        """As many words in random order as take up at most `room` tokens, `cost` being those of each word."""
        mean = sum(share * cost(word) for word, share in self.shares.items())
        number = max(int(room / mean), self.least_words() if self.asked else 0)
        while not self._is_clear(counts := self._counts(number)):
            number -= 1
        room -= sum(count * cost(word) for word, count in counts.items())
        rare = [word for word in self.shares if word not in (*self.asked, *self.noise)]
        most = min((counts[word] for word in self.asked), default=0) - 1
        while fitting := [word for word in rare if counts[word] < most and cost(word) <= room]:
            word = min(fitting, key=lambda word: counts[word])
            counts[word] += 1
            room -= cost(word)
        every = [word for word, count in counts.items() for _ in range(count)]
        return [every[n] for n in rng.permutation(len(every))]

    def even(self) -> WordList:
        """The same words, all equally common: nothing but chance tells which are meant."""
        words = list(self.shares)
        return self._replace(shares=dict.fromkeys(words, 1 / len(words)), asked=(), noise=tuple(words))

    def alone(self, rng: np.random.Generator) -> list[str]:
        """The asked words without any other."""
        every = list(self.asked) * _ALONE
        return [every[n] for n in rng.permutation(len(every))]

    def _counts(self, number: int) -> dict[str, int]:
        return {word: int(share * number) for word, share in self.shares.items()}

    def _is_clear(self, counts: Mapping[str, int]) -> bool:
        if not self.asked:
            return True
        others = [count for word, count in counts.items() if word not in (*self.asked, *self.noise)]
        return min(counts[word] for word in self.asked) > max(others, default=0)
