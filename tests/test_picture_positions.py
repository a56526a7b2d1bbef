"""Two-axis positions of picture tokens: `model.transformer.picture_positions: grid`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.errors import ConfigError
from mmctx.generate import generate
from mmctx.model import MmctxModel, ModelConfig
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.rope import RopeConfig, Rotary, grid_positions, rotate
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


def test_rows_and_columns_count_from_where_the_picture_starts() -> None:
    # Two documents: text, text, a 2 x 2 picture, text; and the picture, text.
    position_ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4])
    slots = torch.tensor([2, 3, 4, 5, 7, 8, 9, 10])
    sequence, row, column = grid_positions(position_ids, slots, torch.arange(8) % 4, columns=2).T
    assert sequence.tolist() == position_ids.tolist()
    assert row.tolist() == [0, 1, 2, 2, 3, 3, 6, 0, 0, 1, 1, 4]
    assert column.tolist() == [0, 1, 2, 3, 2, 3, 6, 0, 1, 0, 1, 4]


def test_one_position_on_all_axes_is_plain_rotation() -> None:
    rotary, positions = Rotary(RopeConfig(), 16), torch.arange(50)
    plain = rotary(positions, torch.float64)
    for got, want in zip(rotary(positions[:, None].expand(-1, 3), torch.float64), plain, strict=True):
        assert torch.equal(got, want)


def test_scores_depend_on_differences_along_each_axis() -> None:
    """Steps of equal size in the sequence, down or to the right score alike from anywhere, and differently from each other."""
    torch.manual_seed(0)
    rotary, q, k = Rotary(RopeConfig(), 16), *torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(start: list[int], step: list[int]) -> float:
        ends = torch.tensor([start, start]) + torch.tensor([[0, 0, 0], step])
        cos, sin = rotary(ends, torch.float64)
        return float((rotate(q, cos[:1], sin[:1]) * rotate(k, cos[1:], sin[1:])).sum())

    steps = [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    near, far = ([score(start, step) for step in steps] for start in ([0, 0, 0], [40, 7, 19]))
    torch.testing.assert_close(near, far)
    assert len({round(value, 6) for value in near}) == 3


@pytest.fixture
def run(tree: dict[str, Any]) -> tuple[MmctxModel, MmctxModel, RunData, list[Document]]:
    """The same weights with positions by the sequence and by the grid."""
    tree["model"]["transformer"] |= {"dropout": 0.0}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    by_sequence = build_model(config, len(data.tokenizer)).double().eval()
    tree["model"]["transformer"] |= {"picture_positions": "grid"}
    by_grid = build_model(build_config(RunConfig, tree, "tree"), len(data.tokenizer)).double().eval()
    by_grid.load_state_dict(by_sequence.state_dict())
    documents = [d for number in (0, 1) for sample in range(4) for d in data.dataset.documents(number, sample, 0)]
    return by_sequence, by_grid, data, documents


def has_picture(document: Document) -> bool:
    return any(item.kind == "image" for _, item in document.media)


@torch.no_grad()
def test_documents_keep_to_themselves_and_those_without_pictures_stay_as_they_were(run) -> None:
    by_sequence, by_grid, data, documents = run

    def pack(documents: list[Document]) -> PackedBatch:
        return pack_documents(documents, data.tokenizer.placeholder_ids)

    batch = pack(documents)
    ordered = [d for d in documents if d.causal] + [d for d in documents if not d.causal]
    together = by_grid.encode(batch).split(batch.layout.lengths)
    plain = by_sequence.encode(batch).split(batch.layout.lengths)
    for document, hidden, before in zip(ordered, together, plain, strict=True):
        torch.testing.assert_close(hidden, by_grid.encode(pack([document])), rtol=1e-10, atol=1e-10)
        assert torch.allclose(hidden, before, rtol=1e-10, atol=1e-10) != has_picture(document)


@torch.no_grad()
def test_generation_takes_the_same_positions(run) -> None:
    _, model, data, documents = run
    prompt = next(d for d in documents if d.causal and has_picture(d))
    batch = pack_documents([prompt], data.tokenizer.placeholder_ids)
    want = model.next_token_logits(model.encode(batch)[-1:]).argmax()
    ((got, *_),) = generate(model, batch, eos_id=-1, max_new_tokens=2)
    assert got == want


def test_heads_too_narrow_for_a_grid_are_refused() -> None:
    tree = {"transformer": {"width": 24, "num_heads": 2, "picture_positions": "grid"}}
    with pytest.raises(ConfigError, match="head width 12 must be a multiple of 8"):
        build_config(ModelConfig, tree, "test")
