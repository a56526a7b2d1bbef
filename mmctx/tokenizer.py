"""Any Transformers fast tokenizer, plus the special tokens that mmctx adds, in this one place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmctx.chat import DEFAULT_TEMPLATE, ChatTemplate
from mmctx.errors import ConfigError
from mmctx.pack import MODALITIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLACEHOLDERS = {kind: f"<|{kind}|>" for kind in MODALITIES}
MASK = "<|mask|>"
EMBED = "<|embed|>"
EOS = "<|endoftext|>"


class TextTokenizer:
    """Turns text into ids and back, and knows the ids of the special tokens.

    A tokenizer's own mask stays the mask, and where it has no end of text, as BERT's, its separator is that.

    Attributes:
        placeholder_ids: of media slots, by modality.
        mask_id: what hides a token.
        embed_id: whose state is an embedding.
        eos_id: end of text.
        cls_id: what BERT's documents begin with; None where the tokenizer has none.
        begin: (1,) int64, the `bos_token` that documents begin with; (0,) where they begin with nothing.

    Args:
        path: folder of a Transformers fast tokenizer.
        bos: see `DataConfig.bos`.

    Raises:
        ConfigError: there is no fast tokenizer at `path`, or `bos` is set and it has no `bos_token`.
    """

    def __init__(self, path: str | Path, bos: bool = False) -> None:
        from transformers import PreTrainedTokenizerFast  # slow to import

        if not (Path(path) / "tokenizer.json").is_file():
            raise ConfigError(
                f"data.tokenizer: {str(path)!r} holds no tokenizer.json; give the folder of a Transformers fast tokenizer "
                "(a slow one becomes fast by AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
        self.path = str(path)
        mask = tokenizer.mask_token or MASK
        ours = [*PLACEHOLDERS.values(), mask, EMBED] if mask == MASK else [*PLACEHOLDERS.values(), EMBED]
        tokenizer.add_special_tokens({"additional_special_tokens": ours}, replace_extra_special_tokens=False)
        if tokenizer.eos_token is None:
            tokenizer.add_special_tokens({"eos_token": tokenizer.sep_token or EOS})
        self.hf: PreTrainedTokenizerFast = tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self.placeholder_ids = {kind: int(ids(token)) for kind, token in PLACEHOLDERS.items()}  # type: ignore[arg-type]
        self.mask_id = int(ids(mask))  # type: ignore[arg-type]
        self.embed_id = int(ids(EMBED))  # type: ignore[arg-type]
        self.eos_id = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        if bos and tokenizer.bos_token is None:
            raise ConfigError(f"data.bos: true, but the tokenizer {str(path)!r} has no bos_token; leave it out")
        self.begin = np.array([tokenizer.bos_token_id] if bos else [], dtype=np.int64)
        self.chat = ChatTemplate.of(tokenizer, bos)
        tokenizer.chat_template = self.chat.source  # so that checkpoints say how conversations were laid out
        self.cls_id = None if tokenizer.cls_token is None else int(tokenizer.cls_token_id)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """One more than the largest id: vocabularies may have holes."""
        return max(self.hf.get_vocab().values()) + 1

    @cached_property
    def is_word(self) -> np.ndarray:
        """(len,) bool, true for ids of ordinary text: neither a special token nor a hole in the vocabulary."""
        table = np.zeros(len(self), dtype=bool)
        table[list(self.hf.get_vocab().values())] = True
        table[[id for id, token in self.hf.added_tokens_decoder.items() if token.special]] = False
        table[[*self.placeholder_ids.values(), self.mask_id, self.embed_id, self.eos_id, *self.begin]] = False
        return table

    @cached_property
    def word_ids(self) -> np.ndarray:
        """Ids of ordinary text, (V',) int64. Masked LM draws its replacements from here."""
        return np.flatnonzero(self.is_word)

    @cached_property
    def definition(self) -> str:
        """The whole mapping from text to ids, as `tokenizer.json` holds it."""
        return self.hf.backend_tokenizer.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """Names the mapping from text and conversations to ids: token counts in an index belong to one fingerprint."""
        template = "" if self.chat.source == DEFAULT_TEMPLATE else self.chat.source + self.chat.begin
        return hashlib.blake2b((self.definition + template).encode(), digest_size=8).hexdigest()

    def require_cls(self, key: str) -> int:
        """The id of the token that BERT's documents begin with, for `key`, which asks for it.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if self.cls_id is None:
            raise ConfigError(
                f"{key}: cls, but the tokenizer {self.path} has no cls_token; leave the key out, or set data.tokenizer"
            )
        return self.cls_id

    def encode(self, text: str) -> np.ndarray:
        """(L,) int64 ids of `text`; special tokens written out in the text are read as plain characters."""
        return np.asarray(
            self.hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], dtype=np.int64
        )

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `encode` makes of each text, in one call: documents may have thousands of segments."""
        return self._encode(texts, plain=True)

    def encode_control(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts in which special tokens written out are special tokens: what a chat template puts between messages."""
        return self._encode(texts, plain=False)

    def _encode(self, texts: Sequence[str], plain: bool) -> list[np.ndarray]:
        if not texts:
            return []
        found = self.hf(list(texts), add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Text of `ids`, special tokens left out."""
        return str(self.hf.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, special tokens included, into a checkpoint folder. There it has a padding token: others pad batches."""
        if self.hf.pad_token is None:
            self.hf.pad_token = self.hf.eos_token
        self.hf.save_pretrained(str(folder))
