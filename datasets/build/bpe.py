"""A small byte-level BPE tokenizer, trained on the demo's own text and saved as a Transformers folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """At most ``vocab_size`` entries: 256 bytes, the end of text, and merges. Any text comes back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_bpe(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``folder`` so that ``AutoTokenizer.from_pretrained(folder)`` reads it."""
    from transformers import (
        PreTrainedTokenizerFast,
    )  # here, not above: a build that skips should not wait seconds for it

    # Byte-level text needs no clean-up of spaces; with it, decoding would not give back what was encoded.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(str(folder))
