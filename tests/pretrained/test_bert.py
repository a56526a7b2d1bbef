"""BERT with both of its objectives: its own marks, its masked LM head and its next sentence head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_models import BERT, make_model
from tiny import WORDS

from mmctx.config import build_config
from mmctx.objectives import build_data_halves
from mmctx.pack import IGNORE_INDEX, pack_documents
from mmctx.sample import Sample
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig
from mmctx.train.loop import train

OBJECTIVES = {
    "masked_lm": {"kind": "masked_lm", "marks": "cls", "rate": 0.4},
    "next": {"kind": "next_sentence", "marks": "cls"},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `BertForPreTraining` with its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(set(WORDS))])}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    make_model("BertForPreTraining", BERT | {"vocab_size": len(vocabulary)}).save_pretrained(folder)
    return folder


def config_of(tree: dict[str, Any], bert: Path) -> RunConfig:
    source = {"shards": tree["data"]["sources"]["triples"]["shards"], "objectives": [*OBJECTIVES]}
    tree["data"] |= {"tokenizer": str(bert), "context_length": 40, "sources": {"texts": source}}
    tree |= {"model": {"transformer": {"pretrained": str(bert)}}, "objectives": OBJECTIVES, "eval": {}}
    return build_config(RunConfig, tree, "tree")


def test_both_heads_equal_berts(tree: dict[str, Any], bert: Path) -> None:
    config = config_of(tree, bert)
    tokens = TextTokenizer(bert)
    assert tokens.hf.mask_token == "[MASK]"
    assert (tokens.eos_id, tokens.cls_id) == (tokens.hf.sep_token_id, tokens.hf.cls_token_id)
    halves = build_data_halves(config.objectives, tokens)
    texts = [np.random.default_rng(n).choice(tokens.word_ids, 5 + n) for n in range(6)]
    documents = [
        document
        for number, text in enumerate(texts)
        for half in halves.values()
        for document in half.documents(Sample("k", "s", number, texts=(text,)), np.random.default_rng(number))
    ]
    batch = pack_documents(documents, tokens.placeholder_ids)
    model = build_model(config, len(tokens)).eval()
    theirs = transformers.BertForPreTraining.from_pretrained(bert).eval()
    num_known = theirs.config.vocab_size
    with torch.no_grad():
        hidden = model.encode(batch)
        logits = model.next_token_logits(hidden)[:, :num_known]
        scores = model.objectives["next"].scores(hidden, batch)  # type: ignore[operator]
        want = [theirs(input_ids=ids[None]) for ids in batch.input_ids.split(batch.layout.lengths)]
        losses = model.losses(batch)
    torch.testing.assert_close(logits, torch.cat([w.prediction_logits[0] for w in want]), rtol=0, atol=1e-5)
    pairs = [n for n, objective in enumerate(batch.objectives) if objective == "next"]
    theirs_next = torch.cat(
        [want[n].seq_relationship_logits for n in pairs]
    )  # (P, 2), the first for a sentence that follows
    assert len(pairs) == 6
    torch.testing.assert_close(scores, theirs_next[:, 0] - theirs_next[:, 1], rtol=0, atol=1e-5)
    labels = batch.labels[batch.label_positions["next"]]
    loss = torch.nn.functional.cross_entropy(theirs_next, 1 - labels, reduction="sum")
    torch.testing.assert_close(losses["next"].total, loss)
    for number in pairs:
        ids = batch.input_ids.split(batch.layout.lengths)[number].tolist()
        assert [ids[0], ids[-1], ids.count(tokens.eos_id)] == [tokens.cls_id, tokens.eos_id, 2]


def test_its_loss_is_theirs_with_biases(tree: dict[str, Any], bert: Path) -> None:
    """Through the chunked loss, gradients of the head included; its new rows stand for tokens that BERT does not have."""
    config = config_of(tree, bert)
    tokens = TextTokenizer(bert)
    model = build_model(config, len(tokens))
    torch.manual_seed(0)
    hidden = torch.randn(7, 48, requires_grad=True)
    labels = torch.randint(0, len(tokens), (7,))
    parameters = [model.embedding.weight, *model.head_transform.parameters()]  # type: ignore[union-attr]
    got = model.output_head.cross_entropy(hidden, labels)
    rows = len(model.embedding.weight)
    want = torch.nn.functional.cross_entropy(model.output_head.logits(hidden, rows), labels, reduction="sum")
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, [hidden, *parameters]), torch.autograd.grad(want, [hidden, *parameters]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_trains(tree: dict[str, Any], bert: Path) -> None:
    tree["data"] |= {"bin_tokens": 200}
    config = config_of(tree, bert)
    assert train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})).step == 2


def test_masks_never_hide_marks(tree: dict[str, Any], bert: Path) -> None:
    tokens = TextTokenizer(bert)
    (half,) = build_data_halves({"masked_lm": config_of(tree, bert).objectives["masked_lm"]}, tokens).values()
    text = tokens.word_ids[:6]
    for seed in range(50):
        (document,) = half.documents(Sample("k", "s", 0, texts=(text,)), np.random.default_rng(seed))
        assert document.input_ids[[0, -1]].tolist() == [tokens.cls_id, tokens.eos_id]
        assert (document.labels[[0, -1]] == IGNORE_INDEX).all()
