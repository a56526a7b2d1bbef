"""README's tables of what goes with what are those of the code."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch

from mmctx.attention import BACKENDS, Request
from mmctx.config import load_config
from mmctx.errors import ConfigError
from mmctx.train.config import RunConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

FEATURES = {
    "train.distribution.kind: fsdp2": ["train.distribution.kind=fsdp2"],
    "train.sequence_parallel": ["train.sequence_parallel=2"],
    "train.optimizer.kind: adafactor": ["train.optimizer={kind: adafactor}"],
    "train.optimizer.kind: muon": ["train.optimizer={kind: muon}"],
    "train.precision: bf16": ["train.precision=bf16"],
    "train.compile": ["train.compile=true"],
    "train.activations.checkpoint": ["train.activations.checkpoint=full"],
    "train.activations.mlp_tile": ["train.activations.mlp_tile=64"],
    "train.ema": ["train.ema={decay: 0.99}"],
    "train.audit": ["train.audit=true"],
    "train.deterministic": ["train.deterministic=true"],
    "dropout": ["model.transformer.dropout=0.1"],
    "windows": ["model.transformer.windows=[512, null]"],
    "learned_positions": ["model.transformer.learned_positions=2048"],
    "norm_place: post": ["model.transformer.norm_place=post"],
    "picture_positions: grid": ["model.transformer.picture_positions=grid", "model.transformer.head_dim=48"],
}


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def goes(*names: str) -> str | None:
    """None if the features go together, or what the config says against it."""
    try:
        load_config(RunConfig, ROOT / "configs/demo.yaml", [change for name in names for change in FEATURES[name]])
    except ConfigError as error:
        return str(error)
    return None


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a line of README, without markup."""
    after = README.split(heading, 1)[1]
    rows = re.search(r"\|.*?\n\|[-| ]+\n((?:\|.*\n)+)", after)
    assert rows, f"README has no table after {heading!r}"
    return [[cell.strip().replace("`", "") for cell in row.strip("|\n").split("|")] for row in rows[1].splitlines()]


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_goes_alone(name: str) -> None:
    assert goes(name) is None


def test_readme_names_what_is_refused_together_and_nothing_else() -> None:
    """All pairs, and all triples in which no pair is refused already."""
    refused: list[set[str]] = []
    for size in (2, 3):
        new = [set(names) for names in combinations(FEATURES, size) if goes(*names)]
        refused += [names for names in new if not any(smaller <= names for smaller in refused)]
    told = [{row[0], *row[1].split(" and ")} for row in table("### What does not go together")]
    assert sorted(map(sorted, told)) == sorted(map(sorted, refused))


def test_readme_names_the_backends_and_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 9.0 is assumed: what is refused there because of its type must be what the table leaves out."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    rows = {row[0]: row for row in table("### Attention and GPUs")}
    assert rows.keys() == BACKENDS.keys()
    for name, backend in BACKENDS.items():
        on_cpu = backend.why_not(Request(device=torch.device("cpu"), dtype=torch.float32, head_dim=64)) is None
        assert on_cpu == ("CPU" in rows[name][1]), name
        if name == "hybrid":  # takes what the backend for its short documents takes
            continue
        told = set(DTYPES) if rows[name][2] == "all" else set(rows[name][2].split(", "))
        for short, dtype in DTYPES.items():
            reason = backend.why_not(Request(device=torch.device("cuda:0"), dtype=dtype, head_dim=64)) or ""
            refused = "the tensors are torch." in reason or "takes no float" in reason
            assert refused == (short not in told), (name, short, reason)
