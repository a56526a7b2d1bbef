"""The training step on a GPU: bf16, flash attention on packs, and no wait for the device inside the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.jsonl import read_lines
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

pytestmark = pytest.mark.gpu


def test_bf16_run_trains_and_is_near_the_fp32_one(tree: dict[str, Any]) -> None:
    tree["model"]["transformer"] |= {"dropout": 0.0, "head_dim": 16}
    losses = {}
    for precision in ("fp32", "bf16"):
        tree["run"]["name"] = precision
        tree["train"]["precision"] = precision
        run_dir = train(build_config(RunConfig, tree, "tree")).run_dir
        losses[precision] = [line["loss"] for line in read_lines(run_dir / "metrics.jsonl")]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_forward_and_backward_never_wait_for_the_device(tree: dict[str, Any]) -> None:
    tree["model"]["transformer"] |= {"head_dim": 16}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer)).cuda()
    batches = [data.dataset[bin] for bin in Plan(config.data, data.tables, 0).step(0)]

    def step(batch) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            losses = model.losses(batch.to("cuda"))
            torch.stack([loss.total / max(loss.count, 1) for loss in losses.values()]).sum().backward()

    step(batches[0])  # kernels load, workspaces are allocated
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[1])
        with pytest.raises(RuntimeError):  # the detector does detect
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
