"""Compiled blocks: the same numbers as eager ones, and one compilation for all lengths."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mmctx.activations import ActivationsConfig
from mmctx.layout import DocumentLayout
from mmctx.transformer import Transformer, TransformerConfig

PACKS = [([40, 24], 1), ([7, 50, 3], 2), ([96], 1), ([33, 32], 0), ([11] * 9, 9)]
"""(document lengths, causal documents) of five steps of other numbers of tokens and documents."""


def make_trunk(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48, "dropout": 0.0}
    config = TransformerConfig.model_validate(shape | {"windows": [8, None]} | changes)
    return Transformer(config).train()


def step(trunk: Transformer, lengths: list[int], num_causal: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one pack of random embeddings."""
    layout = DocumentLayout.from_lengths(lengths, num_causal)
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(sum(lengths), trunk.config.width, generator=generator, requires_grad=True)
    loss = trunk(x, torch.cat([torch.arange(n) for n in lengths]), layout).square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, [x, *trunk.parameters()]))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "activations",
    [{}, {"checkpoint": "full"}, {"checkpoint": "selective"}, {"checkpoint": "full", "every": 2, "mlp_tile": 16}],
    ids=str,
)
@pytest.mark.slow
def test_other_lengths_compile_nothing_new(activations: dict[str, Any]) -> None:
    trunk, eager = make_trunk(), make_trunk()
    trunk.set_activations(ActivationsConfig.model_validate(activations))
    trunk.set_compiler("aot_eager")  # traces as inductor does, generates no code
    step(trunk, *PACKS[0])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3, "projection, merge and MLP, shared by all blocks"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths, num_causal in PACKS[1:]:
            loss, gradients = step(trunk, lengths, num_causal)
            want, want_gradients = step(eager, lengths, num_causal)
            torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
            torch.testing.assert_close(gradients, want_gradients, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
def test_dropout_of_recomputed_blocks_is_the_same_twice() -> None:
    """Were the masks others, a recomputed block's gradient would not be that of its forward pass."""
    found = []
    for checkpoint in ("none", "full"):
        trunk = make_trunk(dropout=0.3)
        trunk.set_activations(ActivationsConfig.model_validate({"checkpoint": checkpoint}))
        trunk.set_compiler("aot_eager")
        torch.manual_seed(3)
        found.append(step(trunk, *PACKS[0]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: apt-get install g++")
def test_code_that_inductor_makes_equals_eager() -> None:
    trunk, eager = make_trunk(depth=2), make_trunk(depth=2)
    trunk.set_compiler("inductor")
    for lengths, num_causal in PACKS[:3]:
        loss, gradients = step(trunk, lengths, num_causal)
        want, want_gradients = step(eager, lengths, num_causal)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients, want_gradients, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 3
