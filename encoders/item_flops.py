"""What an encoder's forward pass costs, as a polynomial of how many embeddings an item becomes."""

from __future__ import annotations

from typing import NamedTuple


class ItemFlops(NamedTuple):
    """FLOPs of a forward pass over an item (picture, or chunk of sound) of t embeddings: `item + t * token + (t * t - t) * square`.

    Attributes:
        item: of the item, whatever its size.
        token: of an embedding, attention to itself included.
        square: of attention, for each ordered pair of different embeddings.
    """

    item: int
    token: int
    square: int
