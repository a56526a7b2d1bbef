"""Documents that the objectives make: their lengths, labels, masks; and the similarity loss against open_clip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.errors import ConfigError
from mmctx.objectives.base import next_token_labels
from mmctx.objectives.captioning import Captioning, CaptioningConfig
from mmctx.objectives.contrastive import SimilarityLoss
from mmctx.objectives.masked_lm import MaskedLM, MaskedLMConfig
from mmctx.objectives.similarity import SimilarityConfig
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, pack_documents
from mmctx.sample import Sample
from mmctx.tokenizer import TextTokenizer
from mmctx.train.config import RunConfig


@pytest.fixture
def data(tree: dict[str, Any]) -> RunData:
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)


@pytest.fixture
def tokenizer(data: RunData) -> TextTokenizer:
    return data.tokenizer


def all_documents(data: RunData) -> list[Document]:
    dataset = data.dataset
    return [
        document
        for number, (source, _) in enumerate(dataset.sources)
        for sample_id in range(source.num_samples)
        for document in dataset.documents(number, sample_id, epoch=0)
    ]


def test_lengths_from_the_index_are_the_lengths_of_the_documents(data: RunData) -> None:
    """The plan packs by these lengths without decoding anything."""
    dataset = data.dataset
    for number, table in enumerate(dataset.tables):
        ids = np.arange(table.num_samples)
        sizes = table.source.sizes(ids, table.preprocessors.image_tokens, table.preprocessors.audio_tokens)
        for name in table.config.objectives:
            predicted = dataset.objectives[name].lengths(sizes)
            for sample_id in ids.tolist():
                documents = [d for d in dataset.documents(number, sample_id, 0) if d.objective == name]
                assert [len(d.input_ids) for d in documents] == [n for n in predicted[sample_id] if n]


def test_every_kind_of_document_occurs(data: RunData) -> None:
    documents = all_documents(data)
    kinds = {(d.objective, d.view, tuple(sorted({item.kind for _, item in d.media}))) for d in documents}
    assert ("captioning", None, ("image",)) in kinds
    assert ("captioning", None, ("audio", "image")) in kinds  # a book
    assert ("similarity", "audio", ("audio",)) in kinds
    assert ("similarity", "text1", ()) in kinds
    assert ("masked_lm", None, ("image",)) in kinds


def test_captions_predict_exactly_their_text_and_its_end(data: RunData, tokenizer: TextTokenizer) -> None:
    for document in all_documents(data):
        if document.objective != "captioning" or len(document.media) != 1 or document.media[0][0] != 0:
            continue
        cut = document.media[0][1].num_tokens
        predicted = document.labels[document.labels != IGNORE_INDEX]
        np.testing.assert_array_equal(predicted, document.input_ids[cut:])
        assert predicted[-1] == tokenizer.eos_id


def test_no_label_is_media_and_none_crosses_a_document(data: RunData, tokenizer: TextTokenizer) -> None:
    documents = all_documents(data)
    batch = pack_documents(documents, tokenizer.placeholder_ids)
    placeholders = list(tokenizer.placeholder_ids.values())
    assert not np.isin(batch.labels.numpy(), placeholders).any()
    for number, (ids, labels) in enumerate(
        zip(batch.input_ids.split(batch.layout.lengths), batch.labels.split(batch.layout.lengths), strict=True)
    ):
        places = (labels != IGNORE_INDEX).nonzero()[:, 0]
        if number < batch.layout.num_causal:  # the next token of the same document; the last has nothing to predict
            assert places.numel() == 0 or places.max() + 1 < len(ids)
            assert torch.equal(labels[places], ids[places + 1])
    labelled = torch.cat(list(batch.label_positions.values())).sort().values
    assert torch.equal(labelled, (batch.labels != IGNORE_INDEX).nonzero()[:, 0])


def test_next_token_labels() -> None:
    ids = np.array([9, 9, 1, 2, 9, 3])  # 9 is a picture
    np.testing.assert_array_equal(next_token_labels(ids, {"image": 9}), [-100, 1, 2, -100, 3, -100])


def test_masked_lm_touches_only_words_and_draws_from_the_vocabulary(tokenizer: TextTokenizer) -> None:
    objective = MaskedLM("mlm", MaskedLMConfig(rate=0.4), tokenizer)
    words = tokenizer.word_ids
    special = np.array([tokenizer.eos_id, tokenizer.mask_id, tokenizer.embed_id, *tokenizer.placeholder_ids.values()])
    assert not np.isin(special, words).any()
    rng = np.random.default_rng(0)
    clean = rng.choice(np.concatenate([words, special]), 20_000)
    ids, labels = objective._mask(clean, rng)
    chosen = labels != IGNORE_INDEX
    assert np.isin(clean[chosen], words).all()
    np.testing.assert_array_equal(ids[~chosen], clean[~chosen])
    np.testing.assert_array_equal(labels[chosen], clean[chosen])
    assert chosen.sum() / np.isin(clean, words).sum() == pytest.approx(0.4, abs=0.02)
    masked = ids[chosen] == tokenizer.mask_id
    kept = ids[chosen] == clean[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1, abs=0.02)
    replaced = ids[chosen][~masked & ~kept]
    assert np.isin(replaced, words).all()
    assert len(np.unique(replaced)) > 0.5 * len(words)  # from the whole vocabulary, not from this text


def test_masked_lm_always_has_something_to_predict(tokenizer: TextTokenizer) -> None:
    objective = MaskedLM("mlm", MaskedLMConfig(rate=0.01), tokenizer)
    sample = Sample(key="k", source="s", uid=0, texts=(tokenizer.word_ids[:1],))
    for seed in range(20):
        (document,) = objective.documents(sample, np.random.default_rng(seed))
        assert (document.labels != IGNORE_INDEX).sum() == 1


def test_masks_depend_on_seed_epoch_and_key_alone(data: RunData) -> None:
    def masks(epoch: int) -> list[list[int]]:
        return [d.input_ids.tolist() for d in data.dataset.documents(0, 3, epoch) if d.objective == "masked_lm"]

    assert masks(0) == masks(0)
    assert any(masks(0) != masks(epoch) for epoch in range(1, 6))


def similarity_batch(tokenizer: TextTokenizer, views: dict[str, list[int]]):
    token = np.array([tokenizer.embed_id])
    nothing = np.full(1, IGNORE_INDEX)
    documents = [
        Document("sim", token, nothing, causal=False, pooled=0, view=view, pair=pair)
        for view, pairs in views.items()
        for pair in pairs
    ]
    return pack_documents(documents, tokenizer.placeholder_ids)


def test_similarity_equals_open_clip(tokenizer: TextTokenizer) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the clip extra")
    torch.manual_seed(0)
    pairs = list(range(12))
    shuffled = [5, 3, 0, 11, 7, 1, 2, 9, 10, 4, 6, 8]
    batch = similarity_batch(tokenizer, {"image": pairs, "text0": shuffled})
    loss = SimilarityLoss("sim", SimilarityConfig(pairs=(("image", "text0"),)), width=16).double()
    hidden = torch.randn(24, 16, dtype=torch.float64, requires_grad=True)
    result = loss(hidden, batch, torch.zeros(1, 16))
    assert result.count == loss.count(batch) == 24
    images = loss.embed(hidden, batch.pooled["sim/image"])
    texts = loss.embed(hidden, batch.pooled["sim/text0"])[np.argsort(shuffled)]
    want = open_clip.ClipLoss()(images, texts, loss.logit_scale.exp())
    torch.testing.assert_close(result.total / result.count, want)
    ours = torch.autograd.grad(result.total / result.count, [hidden, *loss.parameters()])
    theirs = torch.autograd.grad(want, [hidden, *loss.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sample_drawn_twice_is_not_its_own_negative(tokenizer: TextTokenizer) -> None:
    torch.manual_seed(0)
    loss = SimilarityLoss("sim", SimilarityConfig(pairs=(("image", "text0"),)), width=8)
    once = similarity_batch(tokenizer, {"image": [0, 1], "text0": [0, 1]})
    twice = similarity_batch(tokenizer, {"image": [0, 1, 0], "text0": [0, 1, 0]})
    hidden = torch.randn(4, 8)
    doubled = torch.cat([hidden[:2], hidden[:1], hidden[2:], hidden[2:3]])
    want, got = loss(hidden, once, torch.zeros(1, 8)), loss(doubled, twice, torch.zeros(1, 8))
    assert want.count == got.count == 4
    torch.testing.assert_close(want.total, got.total)


def test_two_similarity_objectives_read_their_own_documents(tokenizer: TextTokenizer) -> None:
    torch.manual_seed(0)
    token, nothing = np.array([tokenizer.embed_id]), np.full(1, IGNORE_INDEX)
    documents = [
        Document(name, token, nothing, causal=False, pooled=0, view=view, pair=pair)
        for name in ("one", "two")
        for view in ("image", "text0")
        for pair in range(3)
    ]
    batch = pack_documents(documents, tokenizer.placeholder_ids)
    hidden = torch.randn(12, 8)
    loss = SimilarityLoss("two", SimilarityConfig(pairs=(("image", "text0"),)), width=8)
    alone = pack_documents([d for d in documents if d.objective == "two"], tokenizer.placeholder_ids)
    got, want = loss(hidden, batch, torch.zeros(1, 8)), loss(hidden[6:], alone, torch.zeros(1, 8))
    assert got.count == want.count == 6
    torch.testing.assert_close(got.total, want.total)


@pytest.mark.parametrize(("pairs", "words"), [([], "at least one pair"), ([["img", "text0"]], "'img'")])
def test_impossible_pairs_are_refused(pairs: list, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(SimilarityConfig, {"pairs": pairs}, "tree")


def test_a_tokenizers_own_special_tokens_are_no_words(corpus: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast.from_pretrained(str(corpus / "tokenizer"))
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    own.save_pretrained(str(tmp_path / "own"))
    tokenizer = TextTokenizer(tmp_path / "own")
    assert own.convert_tokens_to_ids("<|im_start|>") not in tokenizer.word_ids
    assert tokenizer.is_word.sum() == len(tokenizer.word_ids) > 250
    tokenizer.save(tmp_path / "saved")
    saved = TextTokenizer(tmp_path / "saved")
    assert saved.fingerprint == tokenizer.fingerprint  # a checkpoint's copy is the same tokenizer
    np.testing.assert_array_equal(saved.word_ids, tokenizer.word_ids)


def test_text_that_spells_a_placeholder_is_plain_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a <|image|> and <|mask|>")
    assert not np.isin(ids, [*tokenizer.placeholder_ids.values(), tokenizer.mask_id]).any()
    assert tokenizer.decode(ids) == "a <|image|> and <|mask|>"


def test_a_view_without_partner_is_a_negative_but_no_query(tokenizer: TextTokenizer) -> None:
    torch.manual_seed(0)
    loss = SimilarityLoss("sim", SimilarityConfig(pairs=(("image", "text0"),)), width=8)
    batch = similarity_batch(tokenizer, {"image": [0, 1], "text0": [1, 2, 3]})
    result = loss(torch.randn(5, 8), batch, torch.zeros(1, 8))
    assert result.count == 2
    assert torch.isfinite(result.total)
    alone = similarity_batch(tokenizer, {"image": [0], "text0": [1]})
    result = loss(torch.randn(2, 8), alone, torch.zeros(1, 8))
    assert (float(result.total), result.count) == (0.0, 0)


def test_scale_is_capped(tokenizer: TextTokenizer) -> None:
    loss = SimilarityLoss("sim", SimilarityConfig(max_scale=10.0), width=8)
    batch = similarity_batch(tokenizer, {"image": [0, 1], "text0": [0, 1]})
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        loss.logit_scale.fill_(50.0)
        capped = loss(hidden, batch, torch.zeros(1, 8)).total
        loss.logit_scale.fill_(np.log(10.0))
        exact = loss(hidden, batch, torch.zeros(1, 8)).total
    torch.testing.assert_close(capped, exact)


@pytest.mark.parametrize("last", [True, False])
def test_texts_without_a_loss_are_read_and_not_predicted(tokenizer: TextTokenizer, last: bool) -> None:
    picture = MediaItem("image", torch.zeros(3, 2, 2, dtype=torch.uint8), 2)
    words = tokenizer.word_ids
    segments = (words[:3], picture, words[3:5], words[5:6], words[6:8])
    sample = Sample(key="k", source="s", uid=0, segments=segments, learned=(False, True, True, False, last))
    (document,) = Captioning("c", CaptioningConfig(), tokenizer).documents(sample, np.random.default_rng(0))
    assert len(document.input_ids) == 11
    predicted = np.flatnonzero(document.labels != IGNORE_INDEX)
    assert predicted.tolist() == [
        4,
        5,
        *([7, 8, 9] if last else []),
    ]  # one before each token of the texts that are learned, and the end
    np.testing.assert_array_equal(document.labels[predicted], document.input_ids[predicted + 1])
