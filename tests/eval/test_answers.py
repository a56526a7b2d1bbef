"""Answers: log-probabilities from the cache against whole forward passes, and exact matches against the originals' rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.eval.answers import GRADERS, continuation_log_probs, says
from mmctx.eval.haystack.probe import Choice, Probe
from mmctx.generate import continue_greedily, generate, read_prompts
from mmctx.model import MmctxModel
from mmctx.pack import IGNORE_INDEX, Document, pack_documents
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig

SHAPES = [{}, {"windows": [5, None]}, {"picture_positions": "grid"}, {"rope": {"scaling": "yarn", "factor": 4.0}}]


def make(tree: dict[str, Any], **shape: Any) -> tuple[MmctxModel, RunData]:
    tree["model"]["transformer"] |= {"dropout": 0.0, **shape}
    config = build_config(RunConfig, tree, "tree")
    data = build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0)
    torch.manual_seed(0)
    model = build_model(config, len(data.tokenizer)).eval()
    for parameter in model.parameters():  # away from the neutral start, so that everything matters
        torch.nn.init.normal_(parameter, std=0.2)
    return model, data


def longer(document: Document, ids: np.ndarray) -> Document:
    from dataclasses import replace

    tokens = np.concatenate([document.input_ids, ids])
    return replace(document, input_ids=tokens, labels=np.full_like(tokens, IGNORE_INDEX))


@torch.no_grad()
def slowly(model: MmctxModel, data: RunData, prompt: Document, lead: np.ndarray, end: np.ndarray) -> float:
    """The same by one forward pass over the prompt and the continuation."""
    whole = longer(prompt, np.concatenate([lead, end]))
    hidden = model.encode(pack_documents([whole], data.tokenizer.placeholder_ids))
    log_probs = model.next_token_logits(hidden).double().log_softmax(dim=1)
    first = len(whole.input_ids) - len(end)
    return float(sum(log_probs[first + n - 1, token] for n, token in enumerate(end.tolist())))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_from_the_cache_are_those_of_whole_documents(tree: dict[str, Any], shape: dict[str, Any]) -> None:
    model, data = make(tree, **shape)
    prompts = [document for sample in range(3) for document in data.dataset.documents(0, sample, 0)[:2]]
    rng = np.random.default_rng(0)
    ids = data.tokenizer.word_ids
    ends = [rng.choice(ids, length) for length in (1, 4, 2, 1)]
    leads = [rng.choice(ids, length) for length in (0, 0, 3, 2)]
    with torch.no_grad():
        last, cache = read_prompts(model, pack_documents(prompts, data.tokenizer.placeholder_ids), 3)
        for row, prompt in enumerate(prompts):
            found = continuation_log_probs(model, last[row], cache, row, leads, ends)
            wanted = [slowly(model, data, prompt, lead, end) for lead, end in zip(leads, ends, strict=True)]
            np.testing.assert_allclose(found, wanted, atol=2e-4)
        # scoring leaves the cache as it was: what is written afterwards is the same
        written = continue_greedily(model, last, cache, data.tokenizer.eos_id, 3)
    assert written == generate(model, pack_documents(prompts, data.tokenizer.placeholder_ids), data.tokenizer.eos_id, 3)


def test_probabilities_of_all_next_tokens_add_up_to_one(tree: dict[str, Any]) -> None:
    model, data = make(tree)
    prompt = data.dataset.documents(0, 0, 0)[0]
    with torch.no_grad():
        last, cache = read_prompts(model, pack_documents([prompt], data.tokenizer.placeholder_ids), 1)
        every = [np.array([token]) for token in range(len(data.tokenizer))]
        nothing = [np.zeros(0, np.int64)] * len(every)
        assert np.exp(continuation_log_probs(model, last[0], cache, 0, nothing, every)).sum() == pytest.approx(1)


def probe(*references: str, labels: tuple[str, ...] = (), asked: tuple[str, ...] = ()) -> Probe:
    choice = Choice(references, tuple(range(len(references))))
    return Probe("k", (), (), (choice,), references, (), (), labels=labels, asked_labels=asked)


@pytest.mark.parametrize(
    ("text", "references", "rulers", "ours"),
    [
        ("The numbers are 12 and 345.", ("12", "345"), (1, 1), (1, 1)),
        ("12345", ("1234",), (1,), (0,)),  # what RULER's part of a string lets pass
        ("91234", ("1234",), (1,), (0,)),
        ("BADO, komi", ("bado", "Komi"), (1, 1), (1, 1)),
        ("a red  house.", ("red house",), (0,), (1,)),
        ("redhouse", ("red house",), (0,), (0,)),
        ("", ("7",), (0,), (0,)),
    ],
)
def test_references_are_found_as_whole_words(
    text: str, references: tuple[str, ...], rulers: tuple[int, ...], ours: tuple[int, ...]
) -> None:
    assert tuple(int(r.lower() in text.lower()) for r in references) == rulers
    assert GRADERS["contains"](text, probe(*references)) == tuple(map(float, ours))


def test_counts_are_compared_place_by_place() -> None:
    assert GRADERS["positions"]("[3, 1, 4]", probe("3", "1", "4")) == (1, 1, 1)
    assert GRADERS["positions"]("3, 4", probe("3", "1", "4")) == (1, 0, 0)
    assert GRADERS["positions"]("none", probe("3")) == (0,)


def test_the_first_integer_counts() -> None:
    assert GRADERS["first_integer"](" 12345. Remember 5", probe("12345")) == (1,)
    assert GRADERS["first_integer"]("is 5, 12345", probe("12345")) == (0,)
    assert GRADERS["first_integer"]("123456", probe("12345")) == (0,)
    assert GRADERS["first_integer"]("nothing", probe("12345")) == (0,)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("kitchen", 1),
        ("the Kitchen. Then the garden.", 1),  # the first sentence alone counts
        ("the kitchen or the garden", 0),
        ("the office, before the hallway", 0),
        ("the kitchen, before the hallway", 1),  # the question's own label is no answer
        ("kitchenette", 0),
        ("", 0),
    ],
)
def test_labels_less_those_of_the_question_are_the_answer(text: str, right: int) -> None:
    places = ("kitchen", "garden", "office", "hallway")
    assert GRADERS["labels"](text, probe("kitchen", labels=places, asked=("hallway",))) == (right,)


def test_says_takes_answers_literally() -> None:
    assert says("costs 3.5 (net)", "3.5")
    assert not says("costs 315", "3.5")
