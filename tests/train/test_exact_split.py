"""Exact objectives: a global step is the same however it is split, in double precision, over real gloo processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import split_worker
import torch
from accelerate.state import AcceleratorState
from test_sequence_parallel import compare, finish, torchrun

TOLERANCES = (1e-12, 1e-10)
"""Of losses and of gradients, relative to the largest element of the tensor, or to 0.01 if that is more."""


@pytest.fixture
def everything(tree: dict[str, Any]) -> dict[str, Any]:
    """The tiny run with every kind of loss there is, without dropout."""
    tree["model"]["transformer"]["dropout"] = 0.0
    pairs = [["audio", "image"], ["image", "text0"]]
    tree["objectives"] |= {
        "yes_or_no": {"kind": "similarity", "pairs": pairs, "loss": "sigmoid", "initial_temperature": 0.1},
        "own_source": {"kind": "similarity", "pairs": pairs, "negatives": "source", "weight": 0.3},
    }
    tree["data"]["sources"]["triples"]["objectives"] = list(tree["objectives"])
    return tree


@pytest.fixture
def alone(everything: dict[str, Any]):
    """One process's results for some numbers of micro-batches."""

    def run(*accumulations: int) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
        try:
            return split_worker.everything(everything, accumulations)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.mark.slow
def test_micro_batches_change_nothing(alone) -> None:
    found = alone(1, 2, 4, 7)
    for (case, accumulation), tensors in found.items():
        compare(tensors, found[case, 1], TOLERANCES, f"{case} in {accumulation}")
        if case != "all":
            assert tensors[f"count/{case}"] > 0
            assert any(g.any() for name, g in tensors.items() if name.startswith("trunk.")), case


def test_it_takes_the_whole_step_to_compare(everything: dict[str, Any], alone) -> None:
    """Were each micro-batch compared with itself alone, the test above would see it."""
    model, data, _ = split_worker.build(everything)
    apart = [model.losses(batch)["similarity"] for batch in split_worker.deal(data, "similarity", 4)]
    whole = alone(4)["similarity", 4]
    assert sum(loss.count for loss in apart) < whole["count/similarity"]
    assert sum(float(loss.total.detach()) for loss in apart) < 0.9 * whole["loss/similarity"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing(everything: dict[str, Any], alone, ranks: int, tmp_path: Path) -> None:
    path, out = tmp_path / "tree.json", tmp_path / "out.pt"
    path.write_text(json.dumps(everything))
    finish(torchrun(ranks, split_worker.__file__, str(path), str(out)))
    expected, found = alone(1), torch.load(out)
    assert len(found) == len(split_worker.ACCUMULATIONS) * len(expected)
    for (case, accumulation), tensors in found.items():
        compare(tensors, expected[case, 1], TOLERANCES, f"{case} on {ranks} ranks, in {accumulation}")
