"""Runs to report on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import write_run
from tiny import tiny_tree


@pytest.fixture(scope="session")
def run_tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run over the tiny corpus; not to be changed."""
    return tiny_tree(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def two_runs(run_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two runs, `short` and `long`, with results of every suite."""
    root = tmp_path_factory.mktemp("two")
    return write_run(root / "short", run_tree, edge=512), write_run(root / "long", run_tree, edge=2048, rate=2e-3)
