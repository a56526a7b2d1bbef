"""Attribution: finds what an answer rests on where that is known, adds up, and leaves other documents alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import book, words, write_shard
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.errors import DataError
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.attribution import METHODS, Answer, answer_gradient, attention_rollout, attribute
from mmctx.eval.segments import segments_of, shares, sums
from mmctx.eval.suites.attribution import answer_start, read_scores, write_scores
from mmctx.model import MmctxModel
from mmctx.objectives.base import lay_out, next_token_labels
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, PackedBatch, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    """Held out: triples (a picture, a clip, texts) and books (interleaved)."""
    write_shard(tmp_path / "books.tar", [book(seed) for seed in range(50, 54)])
    tree["eval"]["sources"]["books"] = {"shards": str(tmp_path / "books.tar"), "objectives": ["captioning"]}
    tree["eval"]["attribution"] = {"documents": 2, "steps": 8}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    torch.manual_seed(0)
    model = build_model(config, len(data.tokenizer)).eval()
    for parameter in model.parameters():  # away from the neutral start
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def picture(seed: int) -> MediaItem:
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 32, 32), dtype=np.uint8))
    return MediaItem("image", values, 4)


def document(context: EvalContext, *segments: np.ndarray | MediaItem, key: str = "key") -> Document:
    placeholders = context.data.tokenizer.placeholder_ids
    input_ids, media = lay_out(segments, placeholders)
    return Document(
        "captioning", input_ids, next_token_labels(input_ids, placeholders), causal=True, media=media, key=key
    )


def text(context: EvalContext, seed: int, count: int = 5) -> np.ndarray:
    return context.data.tokenizer.encode(words(seed, count))


def pack(context: EvalContext, *documents: Document) -> PackedBatch:
    return pack_documents(documents, context.data.tokenizer.placeholder_ids)


class Oracle(nn.Module):
    """In place of the trunk: every state is the mean of the inputs at `known`, so that an answer rests on these alone."""

    def __init__(self, known: slice) -> None:
        super().__init__()
        self.known = known

    def forward(self, embeddings: Tensor, position_ids: Tensor, layout: Any, cache: Any) -> Tensor:
        return embeddings[self.known].mean(0).expand_as(embeddings)


@pytest.mark.parametrize("known", ["picture", "word"])
def test_an_answer_that_rests_on_one_segment_is_laid_to_it(
    context: EvalContext, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mmctx.eval.attribution.attention_rollout", lambda model, batch, position: torch.zeros(batch.num_tokens)
    )
    doc = document(context, text(context, 1), picture(1), text(context, 2), picture(2), text(context, 3))
    cut = len(doc.input_ids) - 2
    segments = segments_of(doc, cut, context.data.tokenizer)
    number = [n for n, s in enumerate(segments) if s.kind == "image"][1] if known == "picture" else 2
    oracle = MmctxModel(context.model.config, context.objectives, context.model.vocab_size).eval()
    oracle.load_state_dict(context.model.state_dict())
    oracle.trunk = Oracle(slice(segments[number].start, segments[number].end))  # type: ignore[assignment]
    found = attribute(oracle, pack(context, doc), Answer(cut, tuple(doc.input_ids[cut:].tolist())))
    for method in ("integrated", "gradient"):
        assert shares(found.scores[method], segments)[number] == pytest.approx(1.0)
    assert found.gap < 1e-3 * abs(found.log_prob - found.baseline)


def test_other_documents_of_the_pack_have_no_gradient(context: EvalContext) -> None:
    docs = [document(context, text(context, n), picture(n), text(context, n + 10)) for n in range(3)]
    batch = pack(context, *docs)
    first, end = len(docs[0].input_ids), len(docs[0].input_ids) + len(docs[1].input_ids)
    answer = Answer(end - 2, tuple(docs[1].input_ids[-2:].tolist()))
    _, gradient = answer_gradient(context.model, batch, context.model.embed(batch).detach(), answer)
    assert gradient[:first].count_nonzero() == gradient[end:].count_nonzero() == 0
    assert (gradient[first : end - 2].abs().sum(-1) > 0).all()
    rollout = attention_rollout(context.model, batch, end - 3)
    assert rollout[:first].count_nonzero() == rollout[end - 2 :].count_nonzero() == 0
    assert float(rollout.sum()) == pytest.approx(1.0, abs=1e-5)
    # and a document is explained as it would be alone
    packed = attribute(context.model, batch, answer)
    alone = attribute(context.model, pack(context, docs[1]), Answer(answer.start - first, answer.tokens))
    for method in METHODS:
        assert packed.scores[method] == pytest.approx(alone.scores[method], abs=1e-4)


def test_integrated_gradients_are_complete(context: EvalContext) -> None:
    model = context.model.double()
    doc = document(context, text(context, 1), picture(1), text(context, 2))
    cut = len(doc.input_ids) - 3
    answer = Answer(cut, tuple(doc.input_ids[cut:].tolist()))
    gaps = [attribute(model, pack(context, doc), answer, steps=steps).gap for steps in (2, 16, 128)]
    found = attribute(model, pack(context, doc), answer, steps=128)
    difference = found.log_prob - found.baseline
    assert abs(difference) > 0.1
    assert found.scores["integrated"].sum() == pytest.approx(difference, rel=1e-4)
    assert gaps[2] < gaps[0]


def test_scores_are_derivatives(context: EvalContext) -> None:
    """Gradient x input against finite differences: the slope of the answer when one token's embedding is made longer."""
    model = context.model.double()
    doc = document(context, text(context, 1), picture(1), text(context, 2))
    batch, cut = pack(context, doc), len(doc.input_ids) - 2
    answer = Answer(cut, tuple(doc.input_ids[cut:].tolist()))
    found = attribute(model, batch, answer, steps=1).scores["gradient"]
    given = model.embed(batch).detach()
    for place in (0, len(text(context, 1)) + 1, cut - 1):
        values = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            changed = given.clone()
            changed[place] *= factor
            hidden = model.trunk(changed, model.positions(batch), batch.layout)[cut - 1 : cut + 1]
            log_probs = model.next_token_logits(hidden).log_softmax(-1)
            values.append(float(log_probs[[0, 1], list(answer.tokens)].sum().detach()))
        assert found[place] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("window", [None, 40])
def test_rollout_is_the_product_of_whole_matrices(context: EvalContext, window: int | None) -> None:
    """Against dense matrices of the queries and keys that the forward pass really attends with."""
    model = context.model
    model.trunk.set_context(model.trunk.config.model_copy(update={"windows": (window, None)}))
    long = [document(context, text(context, n, 80), picture(n), text(context, n + 5, 80)) for n in range(2)]
    batch, place = pack(context, *long), len(long[0].input_ids) + len(long[1].input_ids) - 3
    first = len(long[0].input_ids)
    assert len(long[1].input_ids) > 130  # rows come in more than one block
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.trunk.blocks:
        attend = block.attention.attend
        block.attention.attend = lambda given, *rest, attend=attend: (seen.append(given[:2]), attend(given, *rest))[1]
    with torch.no_grad():
        model.encode(batch)
    length = len(long[1].input_ids)
    product = torch.eye(length, dtype=torch.float64)
    for layer, (q, k) in enumerate(seen):
        q, k = q[first:].double(), k[first:].double().repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        mask = torch.ones(length, length).tril().bool()
        if layer == 0 and window is not None:
            mask &= torch.ones(length, length).triu(1 - window).bool()
        attention = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(0)
        product = (attention + torch.eye(length)) / 2 @ product
    found = attention_rollout(model, batch, place)[first:]
    assert found.double() == pytest.approx(product[place - first], abs=1e-6)


def test_positions_outside_causal_documents_are_refused(context: EvalContext) -> None:
    doc = document(context, text(context, 1))
    batch = pack(context, doc, replace(doc, causal=False))
    for start in (0, len(doc.input_ids) + 2, 10_000):
        with pytest.raises(DataError, match="no causal document"):
            attribute(context.model, batch, Answer(start, (5,)))


def test_every_token_belongs_to_one_segment(context: EvalContext) -> None:
    tokenizer = context.data.tokenizer
    written = "A red cat, 红色的 猫!"
    doc = document(context, tokenizer.encode(written), picture(1), tokenizer.encode(" big dog"))
    segments = segments_of(doc, len(doc.input_ids), tokenizer)
    assert [s.start for s in segments] == [0, *(s.end for s in segments[:-1])]
    assert segments[-1].end == len(doc.input_ids)
    assert [s.text for s in segments] == [
        "A",
        " red",
        " cat,",
        " ",
        "红",
        "色",
        "的",
        " ",
        "猫",
        "!",
        "",
        " big",
        " dog",
    ]
    assert sums(np.arange(len(doc.input_ids)), segments).sum() == np.arange(len(doc.input_ids)).sum()
    cut = segments_of(doc, segments[2].end, tokenizer)
    assert cut == segments[:3]


def test_the_last_predicted_text_is_the_answer(context: EvalContext) -> None:
    doc = document(context, text(context, 1), picture(1), text(context, 2))
    assert answer_start(doc, 100) == len(text(context, 1)) + 4
    assert answer_start(doc, 2) == len(doc.input_ids) - 2
    assert answer_start(document(context, text(context, 1)), 100) == 1
    assert answer_start(replace(doc, labels=np.full_like(doc.labels, IGNORE_INDEX)), 100) == 0


def test_scores_are_written_to_three_digits() -> None:
    assert write_scores(np.array([0.5, -1.0, 0.0, 0.001])) == "500 -999 0 1"
    assert read_scores("500 -999 0 1") == pytest.approx([0.5, -1.0, 0.0, 0.001], abs=1e-3)
    assert write_scores(np.zeros(2)) == "0 0"


@pytest.mark.slow
def test_the_suite_looks_at_documents_of_each_kind(context: EvalContext) -> None:
    (found, again) = on_two_ranks(context, lambda c: evaluate(c, ["attribution"])["attribution"])
    alone = evaluate(context, ["attribution"])["attribution"]
    assert found == again == alone
    assert {kind: part["n"] for kind, part in alone["by_kind"].items()} == {"image": 2, "audio": 2, "interleaved": 2}
    for entry in alone["examples"]:
        for method in METHODS:
            scores = read_scores(entry["scores"][method])
            assert len(scores) == entry["cut"]
            assert np.abs(scores).max() == 1
        assert 0 < entry["media_tokens"] <= 1
    assert all(
        entry["media"]["integrated"] == pytest.approx(1) for entry in alone["examples"] if entry["kind"] == "image"
    )


@pytest.mark.slow
def test_a_model_that_learned_to_name_the_first_picture_rests_on_it(context: EvalContext) -> None:
    """Two pictures of plain colours and words between them; the answer is the first one's colour."""
    torch.manual_seed(0)
    tokenizer = context.data.tokenizer
    names = [tokenizer.encode(name)[:1] for name in ("red", "green", "blue")]
    rng = np.random.default_rng(0)

    def sample() -> tuple[Document, int]:
        colors = rng.integers(0, 3, 2)
        shown = []
        for color in colors:
            values = torch.zeros(3, 32, 32, dtype=torch.uint8)
            values[color] = 255
            shown.append(MediaItem("image", values, 4))
        filler = [text(context, int(rng.integers(1000)), 2) for _ in range(2)]
        return document(context, shown[0], filler[0], shown[1], filler[1], names[colors[0]]), int(colors[0])

    model = MmctxModel(context.model.config.model_copy(), context.objectives, context.model.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        docs = [sample()[0] for _ in range(16)]
        batch = pack(context, *docs)
        last = np.cumsum([len(doc.input_ids) for doc in docs]) - 1
        logits = model.next_token_logits(model.encode(batch)[torch.from_numpy(last - 1)])
        loss = nn.functional.cross_entropy(logits, batch.input_ids[torch.from_numpy(last)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    model.eval()
    most = dict.fromkeys(METHODS, 0)
    for _ in range(20):
        doc, _ = sample()
        cut = len(doc.input_ids) - 1
        found = attribute(model, pack(context, doc), Answer(cut, (int(doc.input_ids[cut]),)), steps=32)
        segments = segments_of(doc, cut, tokenizer)
        for method in METHODS:
            most[method] += int(shares(found.scores[method], segments).argmax() == 0)
    assert most["integrated"] >= 18
