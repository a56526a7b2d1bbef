"""Suite `caption` against pycocoevalcap with its Java tokenizer, sacrebleu, a model that knows every text and one that knows one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import png, triple, words, write_shard
from torch import Tensor, nn
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.eval import EvalContext, evaluate
from mmctx.eval.caption_scores import caption_tokens, error_rates, overlap_scores
from mmctx.pack import PackedBatch
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

SCENES = (
    "a man in a red shirt is riding a brown horse",
    "two dogs aren't playing on the grass, they're asleep",
    "the cat's toy lies on a wooden table near the window",
    "a close-up of a t-shirt with 3.5 stripes",
    "an old woman can't open the green bottle (again)",
    "a boy who doesn't look at the camera holds 12 balloons!",
    "people walking down a busy street at night; cars pass by",
    'a sign that says "stop" & a traffic light',
)


def captions(count: int, seed: int = 0) -> tuple[list[list[str]], list[str]]:
    """References, one to three each, and predictions that share much with them or little."""
    rng = np.random.default_rng(seed)
    references, predictions = [], []
    for _ in range(count):
        own = SCENES[rng.integers(len(SCENES))].split() + words(int(rng.integers(1 << 30)), 2).split()
        references.append(
            [" ".join(word for word in own if rng.random() > 0.15) + "." for _ in range(rng.integers(1, 4))]
        )
        kept = [word for word in own if rng.random() > 0.3] or own
        predictions.append(" ".join(kept) + rng.choice(["", ".", " on the left"]))
    return references, predictions


def test_scores_are_pycocoevalcaps() -> None:
    """Its own path through Java and its own tokenizer."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("pycocoevalcap's tokenizer needs Java: apt-get install default-jre-headless")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references, predictions = captions(80)
    tokenizer = PTBTokenizer()
    wanted = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(references)})
    found = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(predictions)})
    bleu, _ = Bleu().compute_score(wanted, found, verbose=0)
    expected = {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}
    expected |= {"rouge_l": Rouge().compute_score(wanted, found)[0], "cider": Cider().compute_score(wanted, found)[0]}
    scores, left_out = overlap_scores(references, predictions)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert left_out == {}
    assert 0.3 < scores["bleu_4"] < 0.9
    assert 1 < scores["cider"] < 9


def test_bleu_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    references, predictions = captions(60, seed=1)
    streams = [[" ".join(caption_tokens(texts[min(n, len(texts) - 1)])) for texts in references] for n in range(3)]
    tokens = [" ".join(caption_tokens(text)) for text in predictions]
    scores, _ = overlap_scores(references, predictions)
    for order in range(1, 5):
        bleu = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=order)
        assert scores[f"bleu_{order}"] == pytest.approx(bleu.corpus_score(tokens, streams).score / 100, abs=1e-6)


def test_right_texts_score_all_and_one_text_for_all_scores_little() -> None:
    references, _ = captions(60, seed=2)
    best, _ = overlap_scores(references, [texts[0] for texts in references])
    assert {name: value for name, value in best.items() if name != "cider"} == pytest.approx(
        {"bleu_1": 1, "bleu_2": 1, "bleu_3": 1, "bleu_4": 1, "rouge_l": 1}, abs=1e-6
    )
    single, _ = overlap_scores([texts[:1] for texts in references], [texts[0] for texts in references])
    assert single["cider"] == pytest.approx(10)
    blind, _ = overlap_scores(references, ["the"] * 60)
    assert max(blind["bleu_4"], blind["rouge_l"], blind["cider"]) < 0.15


def test_few_captions_have_no_cider() -> None:
    scores, left_out = overlap_scores([["a red cat on a mat"]] * 49, ["a red cat on a mat"] * 49)
    assert scores["bleu_4"] == pytest.approx(1)
    assert "cider" not in scores
    assert left_out == {"cider": "49 captions; CIDEr needs 50 to know which words are rare"}


def test_chinese_is_scored_by_characters() -> None:
    assert caption_tokens("一个女孩,正在OK造型。") == ["一", "个", "女", "孩", "正", "在", "ok", "造", "型"]
    chinese, _ = overlap_scores([["一只红色的猫在睡觉"]], ["一只黑色的猫在睡觉"])
    spaced, _ = overlap_scores([["a b c d e f g h i"]], ["a b x d e f g h i"])
    assert chinese == pytest.approx(spaced)
    assert 0 < chinese["bleu_4"] < 1


def test_error_rates_are_jiwers() -> None:
    rates = error_rates(["A red  cat", "a dog"], ["a red cat", "the dog"])
    assert rates == {"cer": pytest.approx(3 / 14), "wer": pytest.approx(1 / 5), "exact": 0.5, "n": 2}


class Writer(nn.Module):
    """Writes what it holds for a picture or clip, token by token; a `blind` one writes the text of the first for all."""

    def __init__(self, answers: dict[bytes, list[int]], vocab_size: int, blind: bool) -> None:
        super().__init__()
        self.answers, self.vocab_size = list(answers.values()), vocab_size
        self.numbers = {pixels: 0 if blind else number for number, pixels in enumerate(answers)}
        self.place, self.rows = 0, torch.zeros(0, 1)

    def embed(self, batch: PackedBatch) -> Tensor:
        owners = torch.zeros(batch.num_tokens, 1)
        for media in batch.media.values():
            items = media.values.split(list(media.lengths))
            item_of_row = np.repeat(np.arange(len(items)), media.num_tokens)
            for slot, row in zip(media.slots.tolist(), media.rows.tolist(), strict=True):
                owners[slot] = self.numbers[items[item_of_row[row]].numpy().tobytes()]
        return owners

    def positions(self, batch: PackedBatch) -> Tensor:
        return batch.position_ids

    def trunk(self, embedded: Tensor, positions: Tensor, layout: Any, cache: Any) -> Tensor:
        self.place, self.rows = 0, embedded[layout.cu_seqlens[1:].long() - 1]
        return embedded

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        self.place += 1
        return self.rows

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        tokens = [self.answers[int(owner)][self.place :][:1] or self.answers[int(owner)][-1:] for owner in hidden]
        return torch.nn.functional.one_hot(torch.tensor(tokens)[:, 0], self.vocab_size).float()


def held_out(number: int) -> dict[str, Any]:
    """A picture and a clip of its own, its name and two captions."""
    more = [f"a {words(number, 4)} too", f"{words(number + 1, 5)} beside it"]
    text = f"the {words(number, 4)} of {number}"
    return triple(number) | {"png": png(number), "txt": text.encode(), "json": json.dumps({"more": more}).encode()}


@pytest.fixture
def context(tree: dict[str, Any], tmp_path: Path) -> EvalContext:
    write_shard(tmp_path / "h.tar", [held_out(number) for number in range(60)])
    texts = ["txt", "json:more.0", "json:more.1"]
    tree["eval"]["sources"] = {"h": {"shards": str(tmp_path / "h.tar"), "texts": texts, "objectives": ["captioning"]}}
    tree["eval"] |= {"max_new_tokens": 16, "num_examples": 2, "caption": {"references": [1, 2]}}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    model = build_model(config, len(data.tokenizer)).eval()
    return EvalContext(model, data, config.objectives, config.eval, torch.device("cpu"))


def writer(context: EvalContext, blind: bool) -> EvalContext:
    """The same held-out data under a model that knows them."""
    answers: dict[bytes, list[int]] = {}
    for sample in range(60):
        for document in context.data.dataset.documents(0, sample, 0):
            item = document.media[0][1]
            answers[item.values.numpy().tobytes()] = document.input_ids[item.num_tokens :].tolist()
    return replace(context, model=Writer(answers, len(context.data.tokenizer), blind))  # type: ignore[arg-type]


def test_a_model_that_knows_every_text_is_right(context: EvalContext) -> None:
    found = evaluate(writer(context, blind=False), ["caption"])["caption"]
    for kind in ("image", "audio"):
        assert {name: found[f"{kind}_{name}"] for name in ("cer", "wer", "exact", "n")} == {
            "cer": 0, "wer": 0, "exact": 1, "n": 60,
        }  # fmt: skip
    assert [found["image_bleu_4"], found["image_rouge_l"]] == pytest.approx([1, 1])
    assert found["image_cider"] > 2  # one of three references is met, the others are not
    assert "audio_bleu_4" not in found
    assert [(e["kind"], len(e["references"])) for e in found["examples"]] == [("image", 3)] * 2 + [("audio", 3)] * 2
    first = found["examples"][0]
    assert first["reference"] == first["references"][0] == first["prediction"]
    name, sample = first["location"]
    document = json.loads(held_out(sample)["json"])
    assert (name, first["references"][1:]) == ("h", document["more"])


def test_more_references_are_right_too(context: EvalContext) -> None:
    """A model that writes the second text: wrong to the letter, right by BLEU where the second text is a reference."""
    answers: dict[bytes, list[int]] = {}
    for sample in range(60):
        second = context.data.tokenizer.encode(json.loads(held_out(sample)["json"])["more"][0]).tolist()
        for document in context.data.dataset.documents(0, sample, 0):
            answers[document.media[0][1].values.numpy().tobytes()] = [*second, context.data.tokenizer.eos_id]
    model = Writer(answers, len(context.data.tokenizer), blind=False)
    with_more = replace(context, model=model)  # type: ignore[arg-type]
    caption = context.config.caption.model_copy(update={"references": ()})
    without = replace(with_more, config=context.config.model_copy(update={"caption": caption}))
    found, fewer = (evaluate(one, ["caption"])["caption"] for one in (with_more, without))
    assert found["image_exact"] == fewer["image_exact"] == 0
    assert found["image_bleu_4"] == pytest.approx(1)
    assert fewer["image_bleu_4"] < 0.9
    assert found["image_cer"] == fewer["image_cer"] > 0


def test_a_model_that_looks_at_nothing_is_rarely_right(context: EvalContext) -> None:
    found = evaluate(writer(context, blind=True), ["caption"])["caption"]
    assert found["image_exact"] == found["audio_exact"] == pytest.approx(1 / 60)
    assert found["image_cer"] > 0.4
    assert found["image_cider"] < 1


def test_two_ranks_give_the_numbers_of_one(context: EvalContext) -> None:
    alone = evaluate(context, ["caption"])
    assert on_two_ranks(context, lambda one: evaluate(one, ["caption"])) == [alone, alone]
