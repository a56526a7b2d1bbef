"""A trained checkpoint over the tiny corpus, whose similarity head embeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_tree


@pytest.fixture(scope="session")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of three steps."""
    from mmctx.config import build_config
    from mmctx.train.config import RunConfig
    from mmctx.train.loop import train

    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["train"] |= {"steps": 3}
    tree["eval"] = {}
    return train(build_config(RunConfig, tree, "tree")).run_dir
