"""Checkpoints of tiny models with random weights, as the trainer writes them, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_folders import write_checkpoint
from tiny import tiny_tree

import mmctx.hf  # noqa: F401  tells Transformers' Auto classes

UNTIED = {"tie_embeddings": False, "windows": [5, None], "norm": "layer", "qkv_bias": True}

BERT = {
    "learned_positions": 128,
    "norm_place": "post",
    "embedding_norm": True,
    "head_transform": True,
    "activation": "gelu",
    "norm": "layer",
    "qk_norm": False,
} | dict.fromkeys(("qkv_bias", "mlp_bias", "out_bias"), True)

VARIED = {
    "image": {
        "name": "naflexvit_base_patch16_gap",
        "max_patches": 12,
        "options": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "audio": {
        "kind": "whisper",
        "padding": "silence",
        "width": 32,
        "depth": 1,
        "num_heads": 2,
        "mlp_width": 48,
        "num_mels": 20,
        "max_positions": 50,
        "shuffle": 4,
    },
}


@pytest.fixture(scope="session")
def make(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(transformer={...}, **sections)` writes a checkpoint."""

    def build(transformer: dict[str, Any] | None = None, step: int = 1, **sections: Any) -> Path:
        root = tmp_path_factory.mktemp("hf")
        tree = tiny_tree(corpus, root)
        tree["model"] |= sections.pop("model", {})
        tree["model"]["transformer"] |= transformer or {}
        return write_checkpoint(tree | sections, root / "run", step)

    return build


@pytest.fixture(scope="session")
def checkpoint(make: Callable[..., Path]) -> Path:
    """Tied embeddings, grouped heads, RMSNorm. Not to be changed."""
    return make()


@pytest.fixture(scope="session")
def untied(make: Callable[..., Path]) -> Path:
    """An output head, a window in the first layer, LayerNorm, biases. Not to be changed."""
    return make(UNTIED)


@pytest.fixture(scope="session")
def bert(make: Callable[..., Path]) -> Path:
    """Learned positions, norms behind, biases on the logits. Not to be changed."""
    return make(BERT)


@pytest.fixture(scope="session")
def varied(make: Callable[..., Path]) -> Path:
    """Pictures keep their shape, and clips are heard with silence behind them. Not to be changed."""
    return make(model=VARIED)


@pytest.fixture(scope="session", params=["checkpoint", "untied", "bert"])
def either(request: pytest.FixtureRequest) -> Path:
    """Each of them, in turn."""
    return request.getfixturevalue(request.param)
