"""Folders as people publish them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of `MODELS`, saved."""
    from small_models import MODELS, make_model

    root, found = tmp_path_factory.mktemp("models"), {}
    for name, (kind, options) in MODELS.items():
        found[name] = root / name
        make_model(kind, options).save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def llama(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the tiny corpus' tokenizer beside it."""
    from small_models import SMALL, make_model
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(corpus / "tokenizer"))
    tokenizer.save_pretrained(str(folder))
    rows = len(tokenizer) + 11  # some that no token has
    make_model("LlamaForCausalLM", SMALL | {"vocab_size": rows}).save_pretrained(folder)
    return folder
