"""Packed equals unpacked: logits, embeddings, losses and gradients, in fp64, each objective, with pictures and sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.model import MmctxModel
from mmctx.pack import Document, PackedBatch, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


@pytest.fixture
def run(tree: dict[str, Any]) -> tuple[MmctxModel, RunData, list[Document]]:
    tree["model"]["transformer"] |= {"dropout": 0.0, "windows": [None, 6]}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer)).double()
    documents = [d for number in (0, 1) for sample in range(4) for d in data.dataset.documents(number, sample, 0)]
    return model, data, documents


def pack(data: RunData, documents: list[Document]) -> PackedBatch:
    return pack_documents(documents, data.tokenizer.placeholder_ids)


def test_hidden_states_of_a_document_do_not_depend_on_its_neighbours(run) -> None:
    model, data, documents = run
    batch = pack(data, documents)
    ordered = [d for d in documents if d.causal] + [d for d in documents if not d.causal]
    together = model.encode(batch).split(batch.layout.lengths)
    for document, hidden in zip(ordered, together, strict=True):
        alone = model.encode(pack(data, [document]))
        torch.testing.assert_close(hidden, alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            model.next_token_logits(hidden), model.next_token_logits(alone), rtol=1e-10, atol=1e-10
        )
        if document.pooled is not None:
            head: Any = model.objectives["similarity"]
            place = torch.tensor([document.pooled])
            torch.testing.assert_close(head.embed(hidden, place), head.embed(alone, place), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", ["captioning", "masked_lm"])
def test_loss_and_gradients_are_the_sum_over_documents(run, objective: str) -> None:
    model, data, documents = run
    packed = model.losses(pack(data, documents))[objective]  # in the company of the other objectives' documents
    grads = gradients(model, packed.total)
    mine = [d for d in documents if d.objective == objective]
    alone = [model.losses(pack(data, [d]))[objective] for d in mine]
    assert packed.count == sum(part.count for part in alone)
    total = torch.stack([part.total for part in alone]).sum()
    torch.testing.assert_close(packed.total, total)
    compare(grads, gradients(model, total))


def test_similarity_is_that_of_separately_encoded_views(run) -> None:
    model, data, documents = run
    packed = model.losses(pack(data, documents))["similarity"]
    grads = gradients(model, packed.total)
    head: Any = model.objectives["similarity"]
    mine = [d for d in documents if d.objective == "similarity"]
    batch = pack(data, mine)  # gives positions and pairs; the states come from one document at a time
    hidden = torch.cat([model.encode(pack(data, [d])) for d in mine])
    alone = head(hidden, batch, model.output_head)
    assert packed.count == alone.count > 0
    torch.testing.assert_close(packed.total, alone.total)
    compare(grads, gradients(model, alone.total))


def test_a_picture_used_by_several_documents_is_encoded_once(run) -> None:
    _, data, documents = run
    batch = pack(data, documents)
    pictures = {id(item) for d in documents for _, item in d.media if item.kind == "image"}
    assert len(batch.media["image"].values) == len(pictures)
    assert sum(item.kind == "image" for d in documents for _, item in d.media) > len(pictures)


def gradients(model: MmctxModel, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def compare(ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None]) -> None:
    for name, gradient in ours.items():
        other = theirs[name]
        if gradient is None or other is None:
            assert gradient is None or not gradient.any(), name
            assert other is None or not other.any(), name
        else:
            torch.testing.assert_close(
                gradient, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
