"""DDP and FSDP2 equal one process, whatever a rank's batches lack; what they leave behind is read by any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import distribution_worker
import pytest
import torch
from test_sequence_parallel import finish, torchrun

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.train.config import RunConfig

TOLERANCE = {"fsdp2, bf16": 0.05}
"""Relative; 1e-9 where nothing else is said: everything else is in double precision."""


@pytest.fixture(scope="module")
def frugal_tree(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tiny import tiny_tree

    tree = tiny_tree(corpus, tmp_path_factory.mktemp("runs"))
    tree["eval"]["sources"] = {}
    tree["model"]["transformer"] |= {"dropout": 0.0, "depth": 2}  # masks of a sequence group would be other ones
    return tree


@pytest.fixture(scope="module")
def alone(frugal_tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What one process finds."""
    long = distribution_worker.losses(frugal_tree, distribution_worker.Case(200, {}))
    rough = distribution_worker.losses(frugal_tree, distribution_worker.Case(5, {"precision": "bf16"}))
    return {
        name: rough if "bf16" in name else long[: case.steps] for name, case in distribution_worker.CASES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_steps_hang_nobody_and_equal_one_process(
    frugal_tree: dict[str, Any], alone: dict[str, torch.Tensor], tmp_path: Path, ranks: int
) -> None:
    """Pictures, sound, or everything are absent from random bins of random ranks."""
    path, out = tmp_path / "tree.json", tmp_path / "out.pt"
    path.write_text(json.dumps(frugal_tree))
    finish(torchrun(ranks, distribution_worker.__file__, str(path), str(out)))
    found = torch.load(out)
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(
            found[name], expected, rtol=TOLERANCE.get(name, 1e-9), atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert alone["ddp"][-1, -1] != alone["ddp"][0, -1]


def test_what_does_not_go_together_is_refused(tree: dict[str, Any]) -> None:
    tree["train"] |= {"audit": True, "distribution": {"kind": "fsdp2"}}
    with pytest.raises(ConfigError, match="run `mmctx audit CONFIG` instead"):
        build_config(RunConfig, tree, "tree")
