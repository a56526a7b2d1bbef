"""Every objective's documents are as long as the index says, whatever its options; and what each predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmctx.config import build_config
from mmctx.errors import ConfigError
from mmctx.objectives import KINDS, build_data_halves
from mmctx.objectives.captioning import CaptioningConfig
from mmctx.objectives.classification import ClassificationConfig
from mmctx.objectives.corruption import choose_spans, exact_share, shuffle_pieces
from mmctx.objectives.denoising import DenoisingConfig
from mmctx.objectives.masked_lm import MaskedLM, MaskedLMConfig, RateSchedule
from mmctx.objectives.next_sentence import NextSentenceConfig
from mmctx.objectives.regression import RegressionConfig
from mmctx.objectives.similarity import SimilarityConfig
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, pack_documents
from mmctx.sample import Sample, SampleSizes
from mmctx.tokenizer import TextTokenizer

CONFIGS = {
    "captioning": CaptioningConfig(),
    "captioning with a prompt": CaptioningConfig(prompt="red cat: "),
    "captioning with its own prompt": CaptioningConfig(text=0, prompt_text=1),
    "masked_lm": MaskedLMConfig(context="audio"),
    "masked_lm in spans": MaskedLMConfig(span=2.5, rate=0.4, predict_from="before"),
    "causal masked_lm": MaskedLMConfig(attention="causal", rate=RateSchedule(start=0.5, end=0.1, steps=10)),
    "similarity": SimilarityConfig(pairs=(("image", "text0"), ("text0", "text1"))),
    "similarity of spans": SimilarityConfig(pairs=(("span0", "span1"), ("image", "span0")), text=1),
    "similarity of short spans": SimilarityConfig(pairs=(("span0", "span1"),), span_tokens=2, pooling="mean"),
    "next_sentence": NextSentenceConfig(),
    "next_sentence swapped": NextSentenceConfig(negatives="swapped", span_tokens=3),
    "masked_lm as BERT": MaskedLMConfig(marks="cls", context="image"),
    "next_sentence as BERT": NextSentenceConfig(marks="cls"),
    "denoising": DenoisingConfig(delete=0.3, mask=0.3, pieces=3, context="image"),
    "classification": ClassificationConfig(label="of.class", classes=("red", "blue"), texts=(1, 0), context="audio"),
    "classification of pictures": ClassificationConfig(
        label="of.class", classes=("blue", "red"), texts=(), context="image"
    ),
    "regression": RegressionConfig(label="of.numbers.1", causal=True),
    "denoising in spans": DenoisingConfig(delete=0, mask=0.5, span=2, text=1),
}


FACTS = {"of": {"class": "red", "numbers": [None, 2.5]}}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """With a token for `marks: cls`."""
    from transformers import PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokens = {"cls_token": "[CLS]", "bos_token": "<s>"}
    PreTrainedTokenizerFast.from_pretrained(str(corpus / "tokenizer"), **tokens).save_pretrained(folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def beginning(tokenizer: TextTokenizer) -> TextTokenizer:
    """The same, for documents that begin with `<s>`."""
    return TextTokenizer(tokenizer.path, bos=True)


def test_marks_want_a_tokenizer_that_has_them(corpus: Path) -> None:
    plain = TextTokenizer(corpus / "tokenizer")
    for config in (MaskedLMConfig(marks="cls"), NextSentenceConfig(marks="cls")):
        with pytest.raises(ConfigError, match=r"objectives\.x\.marks: cls, but the tokenizer .* has no cls_token"):
            build_data_halves({"x": config}, plain)


def media_item(kind: str, num_tokens: int) -> MediaItem:
    return MediaItem(kind, None, num_tokens)  # type: ignore[arg-type]  # its pixels are nobody's business here


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Plain samples with all, some or none of their parts, and documents of texts, media or both."""
    text = st.lists(st.integers(0, 250), min_size=1, max_size=12).map(lambda ids: np.array(ids, np.int64))
    picture = st.integers(1, 4).map(lambda n: media_item("image", n))
    clip = st.integers(1, 5).map(lambda n: media_item("audio", n))
    if draw(st.booleans()):
        segments = draw(st.lists(st.one_of(text, text, picture, clip), min_size=1, max_size=5))
        return Sample("k", "s", 3, segments=tuple(segments), facts=FACTS)
    texts = tuple(draw(st.none() | text) for _ in range(2))
    image, audio = draw(st.none() | picture), draw(st.none() | clip)
    return Sample("k", "s", 3, texts=texts, image=image, audio=audio, facts=FACTS)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=60, deadline=None)
@given(sample=samples(), seed=st.integers(0, 99), bos=st.booleans())
def test_documents_are_as_long_as_the_index_says(
    tokenizer: TextTokenizer, beginning: TextTokenizer, name: str, sample: Sample, seed: int, bos: bool
) -> None:
    config, tokenizer = CONFIGS[name], beginning if bos else tokenizer
    (half,) = build_data_halves({"x": config}, tokenizer).values()
    documents = half.documents(sample, np.random.default_rng(seed), seed)
    (lengths,) = half.lengths(SampleSizes.of(sample)).tolist()
    assert [len(document.input_ids) for document in documents] == [length for length in lengths if length]
    assert all(document.causal == half.causal for document in documents)
    if documents:
        pack_documents([d for d in documents if not d.media] or [nothing(tokenizer)], tokenizer.placeholder_ids)
    labels = sum(int((document.labels != IGNORE_INDEX).sum()) for document in documents)
    if config.kind in ("captioning", "denoising"):
        (estimated,) = half.labels(SampleSizes.of(sample)).tolist()
        assert labels <= estimated
    again = half.documents(sample, np.random.default_rng(seed), seed)
    for a, b in zip(documents, again, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.labels, b.labels)


def nothing(tokenizer: TextTokenizer) -> Document:
    return Document("x", np.array([tokenizer.eos_id]), np.array([IGNORE_INDEX]), causal=True)


def test_every_kind_is_tried() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(KINDS)


@settings(max_examples=200, deadline=None)
@given(sample=samples(), context_length=st.integers(40, 60), name=st.sampled_from(sorted(CONFIGS)), bos=st.booleans())
def test_samples_that_have_their_room_make_documents_that_fit(
    tokenizer: TextTokenizer, beginning: TextTokenizer, sample: Sample, context_length: int, name: str, bos: bool
) -> None:
    """Long documents are cut to `room`; documents of what is as long as that must not be longer than the context."""
    from mmctx.datasets.planning.split import split_sample

    (half,) = build_data_halves({"x": CONFIGS[name]}, beginning if bos else tokenizer).values()
    long = Sample(
        sample.key,
        sample.source,
        sample.uid,
        tuple(None if text is None else np.tile(text, 99) for text in sample.texts),
        sample.image,
        sample.audio,
        sample.segments and tuple(p if isinstance(p, MediaItem) else np.tile(p, 99) for p in sample.segments),
        facts=FACTS,
    )
    for policy in ("truncate", "split"):
        for part in split_sample(long, policy, half.room(context_length)):
            lengths = half.lengths(SampleSizes.of(part))
            assert lengths.max() <= context_length


def plain(tokenizer: TextTokenizer, length: int, **more: Any) -> Sample:
    return Sample("k", "s", 3, texts=(tokenizer.word_ids[:length],), **more)


def one(config: Any, tokenizer: TextTokenizer, sample: Sample, seed: int = 0, step: int | None = None) -> Document:
    (half,) = build_data_halves({"x": config}, tokenizer).values()
    (document,) = half.documents(sample, np.random.default_rng(seed), step)
    return document


def test_prompts_are_read_and_not_predicted(tokenizer: TextTokenizer) -> None:
    picture = media_item("image", 2)
    text, question = tokenizer.word_ids[:3], tokenizer.word_ids[50:54]
    sample = Sample("k", "s", 0, texts=(text, question), image=picture)
    end = [tokenizer.eos_id]
    fixed = tokenizer.encode("blue cat")
    for config, prompt in (
        (CaptioningConfig(prompt="blue cat"), fixed),
        (CaptioningConfig(prompt_text=1), question),
        (CaptioningConfig(), question[:0]),
    ):
        document = one(config, tokenizer, sample)
        whole = [*[tokenizer.placeholder_ids["image"]] * 2, *prompt, *text, *end]
        assert document.input_ids.tolist() == whole
        places = np.flatnonzero(document.labels != IGNORE_INDEX)
        assert places.tolist() == list(
            range(len(whole) - 5, len(whole) - 1)
        )  # the state before each token, and the end
        assert document.labels[places].tolist() == [*text, *end]
    with pytest.raises(ConfigError, match="keep one"):
        build_config(CaptioningConfig, {"prompt": "a", "prompt_text": 1}, "tree")
    with pytest.raises(ConfigError, match="its own prompt"):
        build_config(CaptioningConfig, {"text": 1, "prompt_text": 1}, "tree")


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_state_before_a_hidden_token_predicts_it(tokenizer: TextTokenizer, attention: Any) -> None:
    """MNTP: labels stand one place before the places that were changed, and the first token, before which no state is, is never hidden."""
    config = MaskedLMConfig(rate=0.5, attention=attention, predict_from="before")
    half = MaskedLM("x", config, tokenizer)
    clean = np.random.default_rng(0).choice(tokenizer.word_ids, 5000)
    ids, labels = half._mask(clean, np.random.default_rng(1))
    places = np.flatnonzero(labels != IGNORE_INDEX)
    np.testing.assert_array_equal(labels[places], clean[places + 1])
    changed = np.flatnonzero(ids != clean)
    assert np.isin(changed - 1, places).all()
    assert ids[0] == clean[0]
    assert len(changed) / len(places) == pytest.approx(0.9, abs=0.03)
    by_default = MaskedLM("x", MaskedLMConfig(attention=attention), tokenizer)
    assert by_default.ahead == (attention == "causal")


def test_spans_are_geometric_and_keep_the_share(tokenizer: TextTokenizer) -> None:
    half = MaskedLM("x", MaskedLMConfig(rate=0.3, span=3.8), tokenizer)
    clean = np.random.default_rng(0).choice(tokenizer.word_ids, 40_000)
    ids, labels = half._mask(clean, np.random.default_rng(1))
    hidden = labels != IGNORE_INDEX
    assert hidden.sum() == pytest.approx(12_000, abs=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden, [0]])))
    lengths = edges[1::2] - edges[::2]
    assert lengths.mean() == pytest.approx(3.8, rel=0.05)
    assert lengths.std() == pytest.approx((3.8 * 2.8) ** 0.5, rel=0.1)  # of a geometric distribution of that mean
    fates = [{bool(masked) for masked in ids[a:b] == tokenizer.mask_id} for a, b in edges.reshape(-1, 2)]
    assert all(len(fate) == 1 for fate in fates)  # a span shares its fate
    short = [
        (
            MaskedLM("x", MaskedLMConfig(rate=0.15, span=3), tokenizer)._mask(clean[:5], np.random.default_rng(n))[1]
            != -100
        ).sum()
        for n in range(2000)
    ]
    assert min(short) == 1  # at least one
    assert set(short) == {1}  # 0.15 of 5 is less than one


@settings(deadline=None)
@given(length=st.integers(1, 60), data=st.data())
def test_spans_take_exactly_their_budget(length: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, length))
    found = choose_spans(
        length, budget, data.draw(st.floats(1, 9)), np.random.default_rng(data.draw(st.integers(0, 9)))
    )
    assert len(found.places) == len(set(found.places.tolist())) == budget
    assert not budget or (found.places.min() >= 0 and found.places.max() < length)
    assert (np.diff(found.places) > 0).all()


@settings(deadline=None)
@given(length=st.integers(1, 30), pieces=st.integers(1, 40), seed=st.integers(0, 9))
def test_shuffling_keeps_every_token(length: int, pieces: int, seed: int) -> None:
    found = shuffle_pieces(np.arange(length), pieces, np.random.default_rng(seed))
    assert sorted(found.tolist()) == list(range(length))
    assert (np.diff(found) != 1).sum() < pieces


def test_the_rate_follows_the_step_and_evaluation_sees_its_end(tokenizer: TextTokenizer) -> None:
    schedule = {"start": 0.6, "end": 0.2, "steps": 100}
    config = build_config(MaskedLMConfig, {"rate": schedule}, "tree")
    sample = plain(tokenizer, 250)

    def share(step: int | None) -> float:
        drawn = [one(config, tokenizer, sample, seed, step).labels != IGNORE_INDEX for seed in range(40)]
        return float(np.mean(drawn))

    for step, expected in ((0, 0.6), (50, 0.4), (100, 0.2), (10_000, 0.2), (None, 0.2)):
        assert share(step) == pytest.approx(expected, abs=0.02)
    for wrong in (0, 1.5, {"start": 0.6, "end": 2, "steps": 3}):
        with pytest.raises(ConfigError, match="rate"):
            build_config(MaskedLMConfig, {"rate": wrong}, "tree")
    assert build_config(MaskedLMConfig, {"rate": 1}, "tree").rate_at(3) == 1


def test_spans_of_a_text_are_neighbours(tokenizer: TextTokenizer) -> None:
    text = tokenizer.word_ids[:21]
    sample = Sample("k", "s", 5, texts=(text,))
    for longest in (None, 4):
        config = SimilarityConfig(pairs=(("span0", "span1"),), span_tokens=longest)
        (half,) = build_data_halves({"x": config}, tokenizer).values()
        starts = set()
        for seed in range(60):
            a, b = half.documents(sample, np.random.default_rng(seed))
            assert (a.view, b.view, a.pair, b.pair) == ("span0", "span1", 5, 5)
            joined = np.concatenate([a.input_ids[:-1], b.input_ids[:-1]])
            start = int(np.flatnonzero(text == joined[0])[0])
            np.testing.assert_array_equal(joined, text[start : start + len(joined)])
            starts.add(start)
        assert starts == ({0} if longest is None else set(range(14)))


def test_mean_pooling_names_every_token_of_a_view(tokenizer: TextTokenizer) -> None:
    text = tokenizer.word_ids[:7]
    config = SimilarityConfig(pairs=(("span0", "span1"),), pooling="mean")
    (half,) = build_data_halves({"x": config}, tokenizer).values()
    documents = half.documents(Sample("k", "s", 5, texts=(text,)), np.random.default_rng(0))
    batch = pack_documents([nothing(tokenizer), *documents], tokenizer.placeholder_ids)
    assert {name: places.tolist() for name, places in batch.pooled.items()} == {
        "x/span0": [1, 2, 3],
        "x/span1": [4, 5, 6, 7],
    }
    assert batch.pool_sizes == {"x/span0": (3,), "x/span1": (4,)}


@pytest.mark.parametrize("negatives", ["distant", "swapped"])
def test_next_sentences_follow_and_others_do_not(tokenizer: TextTokenizer, negatives: Any) -> None:
    text = tokenizer.word_ids[:20]
    where = {token: place for place, token in enumerate(text.tolist())}
    found = []
    for seed in range(400):
        document = one(NextSentenceConfig(negatives=negatives, span_tokens=4), tokenizer, plain(tokenizer, 20), seed)
        a, b = document.input_ids[:4], document.input_ids[5:9]
        assert (document.input_ids[4], document.input_ids[9]) == (tokenizer.eos_id, tokenizer.embed_id)
        assert (document.labels[:-1] == IGNORE_INDEX).all()
        first, second = where[int(a[0])], where[int(b[0])]
        for span, start in ((a, first), (b, second)):
            np.testing.assert_array_equal(span, text[start : start + 4])
        follows = bool(document.labels[-1])
        assert follows == (second == first + 4)
        if not follows:
            assert first - second == 4 if negatives == "swapped" else abs(first - second) >= 8
        found.append((first, second, follows))
    assert np.mean([follows for *_, follows in found]) == pytest.approx(0.5, abs=0.1)
    assert {first for first, _, follows in found if follows} == set(range(13))
    if negatives == "distant":
        assert {first < second for first, second, follows in found if not follows} == {True, False}


def test_denoising_reads_a_corrupted_copy_and_predicts_the_clean_text(tokenizer: TextTokenizer) -> None:
    text = tokenizer.word_ids[:20]
    config = DenoisingConfig(delete=0.25, mask=0.2, pieces=3, context="image")
    sample = plain(tokenizer, 20, image=media_item("image", 2))
    orders = set()
    for seed in range(30):
        document = one(config, tokenizer, sample, seed)
        medium, corrupted, rest = np.split(document.input_ids, [2, 17])
        assert (medium == tokenizer.placeholder_ids["image"]).all()
        masked = corrupted == tokenizer.mask_id
        assert masked.sum() == 3  # floor(0.2 * (20 - floor(0.25 * 20)))
        left = corrupted[~masked]
        assert np.isin(left, text).all()
        assert len(np.unique(left)) == len(left) == 12
        orders.add(bool((np.diff(left) > 0).all()))
        np.testing.assert_array_equal(rest, [tokenizer.eos_id, *text, tokenizer.eos_id])
        places = np.flatnonzero(document.labels != IGNORE_INDEX)
        assert places.tolist() == list(range(17, 38))
        np.testing.assert_array_equal(document.labels[places], rest[1:])
    assert orders == {True, False}
    with pytest.raises(ConfigError, match="corrupt nothing"):
        build_config(DenoisingConfig, {"delete": 0, "mask": 0}, "tree")


def test_exact_shares_are_integers() -> None:
    assert exact_share(10, 0.3) == 3  # 0.3 * 10 in floating point is 3, 0.7 * 10 is not always 7
    np.testing.assert_array_equal(exact_share(np.arange(11), 0.7), np.arange(11) * 7 // 10)
