"""Settings of memory leave losses and gradients as they are, and keep what they say they keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmctx.activations import ATTENTION_KERNELS, ActivationsConfig, in_tiles
from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.errors import ConfigError
from mmctx.layout import DocumentLayout
from mmctx.offload import HostOffload
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.transformer import Transformer, TransformerConfig

SAME_ARITHMETIC = [
    {"checkpoint": "full"},
    {"checkpoint": "selective"},
    {"checkpoint": "full", "every": 2},
    {"checkpoint": "selective", "offload": True},
]
OTHER_SUMS = [
    {"mlp_tile": 100},
    {"checkpoint": "full", "mlp_tile": 7},
    {"checkpoint": "selective", "mlp_tile": 100_000},
    {"media_chunk": 1},
    {"checkpoint": "full", "mlp_tile": 64, "media_chunk": 2},
]

Gradients = dict[str, Tensor]


class CountAttention(TorchDispatchMode):
    """How often attention kernels run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += func.name() in ATTENTION_KERNELS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step(tree: dict[str, Any]) -> Callable[..., tuple[Tensor, Gradients]]:
    """A forward and backward pass over one real batch of every modality and objective: (losses, gradients)."""
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    batch = data.dataset[Plan(config.data, data.tables, 0).step(0)[0]]
    assert set(batch.media) == {"image", "audio"}
    assert len(batch.media["audio"].lengths) > 2

    def run(activations: dict[str, Any], dropout: float, autocast: bool = False) -> tuple[Tensor, Gradients]:
        changed = config.model.transformer.model_copy(update={"dropout": dropout})
        shape = config.model_copy(update={"model": config.model.model_copy(update={"transformer": changed})})
        model = build_model(shape, len(data.tokenizer)).train()
        model.set_activations(ActivationsConfig(**activations))
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = torch.stack([loss.total / max(loss.count, 1) for loss in model.losses(batch).values()])
        losses.sum().backward()
        return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return run


@pytest.mark.parametrize("activations", SAME_ARITHMETIC, ids=str)
@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.2, False), (0.2, True)])
def test_recomputing_changes_no_bit(step, activations: dict[str, Any], dropout: float, autocast: bool) -> None:
    losses, gradients = step({}, dropout, autocast)
    found, found_gradients = step(activations, dropout, autocast)
    assert torch.equal(found, losses)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(found_gradients[name], gradient), name


@pytest.mark.parametrize("activations", OTHER_SUMS, ids=str)
def test_tiles_and_chunks_change_rounding_alone(step, activations: dict[str, Any]) -> None:
    losses, gradients = step({}, 0.0)
    found, found_gradients = step(activations, 0.0)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_tiles_with_dropout_draw_the_same_masks_twice() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).double()
    x = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for tiled in (lambda: in_tiles(layer, x, 3, random=True), lambda: torch.cat([layer(t) for t in x.split(3)])):
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(tiled().square().sum(), [x, *layer.parameters()]))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("activations", "calls"),
    [({}, 4), ({"checkpoint": "full"}, 8), ({"checkpoint": "full", "every": 2}, 6), ({"checkpoint": "selective"}, 4)],
    ids=str,
)
def test_selective_checkpointing_does_not_attend_again(activations: dict[str, Any], calls: int) -> None:
    trunk = Transformer(TransformerConfig(width=32, depth=4, num_heads=2, mlp_width=48)).train()
    trunk.set_activations(ActivationsConfig(**activations))
    layout = DocumentLayout.from_lengths([20], 1)
    with CountAttention() as counter:
        trunk(torch.randn(20, 32, requires_grad=True), torch.arange(20), layout).sum().backward()
    assert counter.calls.total() == calls


def test_nothing_is_recomputed_in_evaluation() -> None:
    trunk = Transformer(TransformerConfig(width=32, depth=2, num_heads=2, mlp_width=48)).eval()
    trunk.set_activations(ActivationsConfig(checkpoint="full", mlp_tile=4))
    layout = DocumentLayout.from_lengths([20], 1)
    with CountAttention() as counter:
        trunk(torch.randn(20, 32, requires_grad=True), torch.arange(20), layout).sum().backward()
    assert counter.calls.total() == 2


@pytest.mark.parametrize("checkpoint", ["full", "selective"])
def test_offloaded_inputs_come_back_whole(checkpoint: str) -> None:
    """Copies on the CPU go the same way as those to the host, without streams."""
    torch.manual_seed(0)
    trunk = Transformer(TransformerConfig(width=32, depth=4, num_heads=2, mlp_width=48)).double().train()
    trunk.set_activations(ActivationsConfig.model_validate({"checkpoint": checkpoint}))
    x = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    layout = DocumentLayout.from_lengths([13, 7], 1)
    rope = trunk.rope(torch.arange(20), x.dtype)
    found = []
    for offload in (None, HostOffload(x.device, min_bytes=1)):
        hidden = x
        for block in trunk.blocks:
            if offload is None:
                hidden = block(hidden, rope, layout)
                continue
            with offload.layer():
                hidden = block(hidden, rope, layout)
        if offload is not None:
            parked = [len(layer) for layer in offload.layers]
            assert min(parked) >= (
                1 if checkpoint == "full" else 3
            )  # the input; attention's results of both documents as well
            assert all(p.here is None for layer in offload.layers[:-1] for p in layer)
        found.append(torch.autograd.grad(hidden.square().sum(), [x, *trunk.blocks.parameters()]))
        if offload is not None:
            assert not any(offload.layers), "each came back once"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_offload_on_a_gpu_changes_no_bit_and_frees_memory() -> None:
    trunk = Transformer(TransformerConfig(width=512, depth=12, num_heads=8, mlp_width=1024)).cuda().train()
    layout = DocumentLayout.from_lengths([8192, 8192], 1, "cuda")
    positions = torch.cat([torch.arange(8192)] * 2).cuda()
    x = torch.randn(16384, 512, device="cuda", requires_grad=True)
    gradients, kept = [], []
    for offload in (False, True):
        trunk.set_activations(ActivationsConfig(checkpoint="full", offload=offload))
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            out = trunk(x, positions, layout)
        kept.append(torch.cuda.memory_allocated() - before)
        gradients.append(torch.autograd.grad(out.float().square().mean(), [x, *trunk.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    block_input = 16384 * 512 * 4
    assert kept[0] - kept[1] >= 9 * block_input


def test_offloading_needs_checkpoints(tree: dict[str, Any]) -> None:
    tree["train"]["activations"] = {"offload": True}
    with pytest.raises(ConfigError, match=r"train\.activations.*set checkpoint to full or selective"):
        build_config(RunConfig, tree, "tree")
