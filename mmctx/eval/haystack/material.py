"""Pictures and clips with names: held-out samples of the run that captioning reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmctx.datasets.assemble import RunData
from mmctx.eval.haystack.sources import read_samples
from mmctx.pack import IGNORE_INDEX, MediaItem

LONGEST_NAME = 32
"""Tokens; longer captions are no names."""


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A picture or a clip, and what its sample says it shows."""

    name: str
    item: MediaItem


def named_media(data: RunData, sources: Sequence[str], most: int) -> dict[str, list[Named]]:
    """By modality, pictures and clips with different names.

    Args:
        data: held-out samples of captioning alone.
        sources: names of sources; empty for all.
        most: samples of each source that are looked at.
    """
    found: dict[str, dict[str, Named]] = {"image": {}, "audio": {}}
    for _, documents in read_samples(data, sources, most):
        for document in documents:
            if len(document.media) != 1 or document.media[0][0] != 0:
                continue  # plain text, or an interleaved document: nothing says what its media show
            start = int(np.flatnonzero(document.labels != IGNORE_INDEX)[0]) + 1  # behind the medium and a prompt
            ids = document.input_ids[start:-1]
            name = " ".join(data.tokenizer.decode(ids).split())
            item = document.media[0][1]
            if name and len(ids) <= LONGEST_NAME:
                found[item.kind].setdefault(name.lower(), Named(name, item))
    return {kind: list(named.values()) for kind, named in found.items()}
