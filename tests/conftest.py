"""Shared by all tests: GPU tests skip where there is no GPU, and torch keeps to the machine's cores."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: here, and in the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="mmctx-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # what tests find does not depend on what this user ran before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, made once; tests that change files copy it first."""
    from tiny import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def fast_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: for tests that flush many files to the disk and are not about the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="mmctx-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def tree(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A fresh tree of the tiny run, its runs folder below `tmp_path`."""
    from tiny import tiny_tree

    return tiny_tree(corpus, tmp_path / "runs")
