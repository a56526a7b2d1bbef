"""Text, augmented in exact numbers of tokens: the plan has promised how long documents are.

Shapes: n tokens of a text, L of a document.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmctx.datasets.augment.config import TextAugmentConfig
from mmctx.objectives.corruption import choose, exact_share
from mmctx.pack import Document
from mmctx.tokenizer import TextTokenizer


def drop_tokens(
    document: Document, config: TextAugmentConfig, tokenizer: TextTokenizer, rng: np.random.Generator
) -> Document:
    """The document with the mask, or other tokens, in the place of some of its words; labels, special tokens and media stay as they are."""
    words = np.flatnonzero(tokenizer.is_word[document.input_ids])
    masked, replaced = exact_share(len(words), config.mask), exact_share(len(words), config.replace)
    if not masked + replaced:
        return document
    places = words[rng.permutation(choose(len(words), masked + replaced, rng).places)]
    input_ids = document.input_ids.copy()
    input_ids[places[:masked]] = tokenizer.mask_id
    input_ids[places[masked:]] = rng.choice(tokenizer.word_ids, size=replaced)
    return replace(document, input_ids=input_ids)
