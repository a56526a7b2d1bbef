"""Nothing in a training step asks the device for a value, as far as that can be seen without a GPU.

On the meta device there are no values to ask for: `.item()`, `.tolist()`, `nonzero` and copies to the host are errors. What runs on the
host by design (document lengths, buckets) is on the CPU there. The loop itself is watched on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from mmctx.activations import ActivationsConfig
from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.train.attention import settled_attention
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.interval import Interval
from mmctx.train.loop import _sit_down

POLICIES = [{}, {"checkpoint": "full", "mlp_tile": 50, "media_chunk": 2}, {"checkpoint": "selective"}]


class NoValues(TorchDispatchMode):
    """An error wherever a tensor of floats becomes a number of Python. Integers are lengths, which live on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            raise AssertionError(f"the step waits for the value of a tensor {tuple(args[0].shape)} {args[0].dtype}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activations", POLICIES, ids=str)
def test_model_and_losses_need_no_value_of_the_device(tree: dict[str, Any], activations: dict[str, Any]) -> None:
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    batch = data.dataset[Plan(config.data, data.tables, 0).step(0)[0]]
    with torch.device("meta"):
        model = build_model(config, len(data.tokenizer)).train()
    model.set_activations(ActivationsConfig.model_validate(activations))
    losses = model.losses(batch.to("meta"))
    torch.stack([loss.total / max(loss.count, 1) for loss in losses.values()]).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(gradient is not None and gradient.is_meta for gradient in gradients)


def test_a_step_of_the_loop_reads_no_value(tree: dict[str, Any]) -> None:
    """Optimizer, clipping, counts and records included; lines are written elsewhere."""
    config = build_config(RunConfig, tree, "tree")
    accelerator = Accelerator(cpu=True)
    try:
        with settled_attention(config, accelerator) as attention:
            sitting = _sit_down(config, accelerator, attention)
        loader, interval = sitting._batches(), Interval()
        batches = [next(loader) for _ in sitting.plan.step(0)]  # decoding looks at values, on the host
        sitting.model.train()
        with NoValues():
            sitting._step(iter(batches), interval)
        assert interval.grad_norm is not None
        with pytest.raises(AssertionError, match="waits for the value"), NoValues():
            float(interval.grad_norm)
        sitting.close()
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)
