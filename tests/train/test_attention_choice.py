"""A run settles its attention backends at the start, writes them down, and can be made deterministic."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mmctx.attention import BACKENDS, Backend, Request
from mmctx.attention.sdpa import sdpa_attention
from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.jsonl import read_lines
from mmctx.train.attention import layer_requests
from mmctx.train.config import RunConfig
from mmctx.train.loop import train


def test_requests_are_what_the_layers_ask(tree: dict[str, Any]) -> None:
    tree["model"]["transformer"] |= {"windows": [None, 16], "head_dim": 24}
    tree["train"]["precision"] = "bf16"
    requests = layer_requests(build_config(RunConfig, tree, "tree"), torch.device("cpu"))
    assert requests == {
        "global": Request(torch.device("cpu"), torch.bfloat16, 24),
        "local": Request(torch.device("cpu"), torch.bfloat16, 24, windowed=True),
    }


def test_a_backend_that_is_not_deterministic_is_refused_before_the_run(tree, monkeypatch) -> None:
    def why_not(request: Request) -> str | None:
        return "its backward pass is not deterministic" if request.deterministic else None

    monkeypatch.setitem(BACKENDS, "loose", Backend("loose", sdpa_attention, why_not, ""))
    tree["model"]["transformer"]["attention"] = "loose"
    tree["train"]["deterministic"] = True
    with pytest.raises(ConfigError, match=r"attention=loose: .*train\.deterministic is true, but its backward pass"):
        train(build_config(RunConfig, tree, "tree"))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_a_deterministic_run_repeats_its_bits_and_says_what_it_used(tree, capsys) -> None:
    tree["train"] |= {"deterministic": True, "steps": 3}
    tree["eval"]["sources"] = {}
    lines = []
    for name in ("one", "two"):
        tree["run"]["name"] = name
        run_dir = train(build_config(RunConfig, tree, "tree")).run_dir
        lines.append([(line["loss"], line["grad_norm"]) for line in read_lines(run_dir / "metrics.jsonl")])
        manifest = json.loads((run_dir / "manifest.json").read_text())
        assert manifest["attention"]["backends"] == {"global": "sdpa"}
    assert lines[0] == lines[1]
    assert not torch.are_deterministic_algorithms_enabled()
    assert "attention: sdpa, deterministic" in capsys.readouterr().err
