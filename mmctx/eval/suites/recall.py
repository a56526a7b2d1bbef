"""Suite `recall`: is a fact recalled when it is asked at the end of a document of L tokens, whatever its depth?

Reads held-out documents that `mmctx data build recall` made, whose json member names their questions. One forward pass answers
all questions of a document: each is asked after the same text, and its answer is one token. An answer counts as exact if it is
the likeliest token of the whole vocabulary; besides, it is compared by log-probability with all values that the document holds,
so that weak models score above chance when they can.

Shapes: Q questions, V vocabulary, C candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmctx.datasets.build.recall_words import SHOWN
from mmctx.errors import DataError, SampleError
from mmctx.eval.context import EvalContext, each
from mmctx.eval.documents import excerpt, grouped, num_tokens
from mmctx.eval.intervals import PASSES, wilson_interval
from mmctx.pack import Document, pack_documents

NUM_DEPTHS = 5
"""Equal stretches of a document that results are told apart by."""
WRITTEN = {"questions", "values", "length"}
"""Keys of a json member that `mmctx data build recall` made."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a document. Spans are [start, end) in its tokens, the value last in both.

    Attributes:
        kind: `recall`, `needle`, `picture` or `shown`.
        fact: where it is stated.
        ask: where it is asked.
        answer: token id of its value.
    """

    kind: str
    fact: tuple[int, int]
    ask: tuple[int, int]
    answer: int


@dataclass(frozen=True, slots=True, eq=False)
class Quiz:
    """A document with its questions.

    Attributes:
        document: causal.
        questions: in reading order.
        candidates: (C,) ids of the values that it holds.
        lead: tokens that it begins with, whatever it says.
    """

    document: Document
    questions: tuple[Asked, ...]
    candidates: np.ndarray
    lead: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """How one question was answered.

    Attributes:
        kind: of the question.
        length: tokens of the document.
        depth: where its fact stands, as a share of what comes before the questions: 0 at the start, 1 right before them.
        exact: the answer is the likeliest token of all.
        best: it is the likeliest candidate.
        log_prob: its log-probability among the candidates.
        num_candidates: C.
    """

    kind: str
    length: int
    depth: float
    exact: bool
    best: bool
    log_prob: float
    num_candidates: int


def evaluate_recall(context: EvalContext) -> dict[str, Any]:
    """`{"lengths": {L: {"all", "recall", "needle", "picture", "depths"}}, "heat": {kind: {L: {depths: score}}}, "controls": {"alone",
    "removed"}}`, see `score`.

    The controls are scored on the shortest documents: a fact alone before its question must be recalled, and without any of the asked
    facts answers must be at chance. Nothing where no held-out document has questions.
    """
    quizzes = load_quizzes(context)
    shortest = min((len(quiz.document.input_ids) for quiz in quizzes), default=0)

    def answer(group: list[Quiz]) -> tuple[list[Answer], list[Answer], list[Answer]]:
        found = answer_quizzes(context, group)
        short = [quiz for quiz in group if len(quiz.document.input_ids) == shortest]
        if not short:
            return found, [], []
        alone = answer_quizzes(context, [part for quiz in short for part in facts_alone(quiz)])
        return found, alone, answer_quizzes(context, [without_facts(quiz) for quiz in short])

    groups = grouped(quizzes, num_tokens([quiz.document for quiz in quizzes]), context.data.config.bin_tokens)
    if not groups:
        return {}
    found, alone, removed = (list(each(part)) for part in zip(*context.map("recall", groups, answer), strict=True))
    answers: dict[int, list[Answer]] = {}
    for one in found:
        answers.setdefault(one.length, []).append(one)
    return {
        "lengths": {str(length): _by_kind_and_depth(part) for length, part in sorted(answers.items())},
        "heat": _heat_maps(answers),
        "controls": {"alone": score(alone), "removed": score(removed)},
    }


def recall_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The share of exact answers at each length."""
    return {length: scores["all"]["exact"] for length, scores in results.get("lengths", {}).items()}


def load_quizzes(context: EvalContext) -> list[Quiz]:
    """Every held-out document that has questions, shorter ones first.

    Raises:
        DataError: a document's tokens are not those that it was built for.
    """
    found = []
    for objective in context.names("captioning")[:1]:
        data = context.data.only(objective)
        for number, table in enumerate(data.dataset.tables):
            for sample_id in range(table.num_samples):
                try:
                    about = json.loads(table.source.read(sample_id).members.get("json", b"null"))
                    if not isinstance(about, dict) or not about.keys() >= WRITTEN or not about["questions"]:
                        continue  # of another origin: json members hold whatever their owners like
                    (document,) = data.dataset.documents(number, sample_id, 0)
                except (SampleError, ValueError):  # the plan tells of samples that cannot be used
                    continue
                found.append(_quiz(document, about, data.tokenizer))
    return sorted(found, key=lambda quiz: len(quiz.document.input_ids))


def _quiz(document: Document, about: Mapping[str, Any], tokenizer: Any) -> Quiz:
    ids, lead = document.input_ids, len(tokenizer.begin)
    if len(ids) - lead != about["length"]:
        raise DataError(
            f"sample {document.key!r} makes {len(ids) - lead} tokens, but was built for {about['length']}: build it with the tokenizer of "
            "the same build, and with picture_tokens as many as model.image makes of a picture"
        )
    values = dict(zip(about["values"], (int(i[0]) for i in tokenizer.encode_many(about["values"])), strict=True))
    asked = [
        Asked(q["kind"], _span(q["fact"], lead), _span(q["ask"], lead), values[q["answer"]]) for q in about["questions"]
    ]
    for question in asked:
        stated = ids[question.fact[1] - 1] if question.kind != SHOWN else question.answer
        if not question.answer == ids[question.ask[1] - 1] == stated:
            raise DataError(
                f"sample {document.key!r}: token {question.ask[1] - 1} is no answer; build it with as many picture_tokens as "
                "model.image makes of a picture"
            )
    return Quiz(document, tuple(asked), np.array(sorted(values.values())), lead)


def _span(written: Sequence[int], lead: int) -> tuple[int, int]:
    return written[0] + lead, written[1] + lead


def answer_quizzes(context: EvalContext, quizzes: Sequence[Quiz]) -> list[Answer]:
    """All answers of some documents, in one forward pass."""
    documents = [quiz.document for quiz in quizzes]
    batch = pack_documents(documents, context.data.tokenizer.placeholder_ids).to(context.device)
    starts = np.cumsum([0, *(len(document.input_ids) for document in documents)])
    places = [start + q.ask[1] - 2 for start, quiz in zip(starts[:-1], quizzes, strict=True) for q in quiz.questions]
    hidden = context.model.encode(batch).index_select(0, torch.tensor(places, device=context.device))
    logits = context.model.next_token_logits(hidden).double().cpu()  # (Q, V)
    rows = iter(logits)
    return [_answer(quiz, question, next(rows)) for quiz in quizzes for question in quiz.questions]


def _answer(quiz: Quiz, question: Asked, logits: torch.Tensor) -> Answer:
    log_probs = logits[torch.from_numpy(quiz.candidates)].log_softmax(0)  # (C,)
    place = int(np.flatnonzero(quiz.candidates == question.answer)[0])
    return Answer(
        kind=question.kind,
        length=len(quiz.document.input_ids),
        depth=question.fact[0] / max(quiz.questions[0].ask[0], 1),
        exact=int(logits.argmax()) == question.answer,
        best=int(log_probs.argmax()) == place,
        log_prob=float(log_probs[place]),
        num_candidates=len(quiz.candidates),
    )


def without_facts(quiz: Quiz) -> Quiz:
    """The document without the facts that it asks for: nothing but chance can answer."""
    spans, end = [], 0
    for start, stop in sorted(question.fact for question in quiz.questions):
        spans.append((end, start))
        end = stop
    removed = sum(stop - start for start, stop in (question.fact for question in quiz.questions))
    document = excerpt(quiz.document, [*spans, (end, len(quiz.document.input_ids))])
    moved = [
        replace(q, fact=(quiz.lead, quiz.lead), ask=(q.ask[0] - removed, q.ask[1] - removed)) for q in quiz.questions
    ]
    return replace(quiz, document=document, questions=tuple(moved))


def facts_alone(quiz: Quiz) -> Iterator[Quiz]:
    """For each question a document of its fact and the question, nothing else."""
    start = quiz.lead
    for question in quiz.questions:
        document = excerpt(quiz.document, [(0, start), question.fact, question.ask])
        middle, end = start + question.fact[1] - question.fact[0], len(document.input_ids)
        yield replace(quiz, document=document, questions=(replace(question, fact=(start, middle), ask=(middle, end)),))


def score(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of `exact` answers with its Wilson interval `low` to `high`, share of `candidates`, mean `log_prob`, `chance` and `n`."""
    exact = sum(answer.exact for answer in answers)
    low, high = wilson_interval(exact, len(answers))
    return {
        "exact": exact / len(answers),
        "low": low,
        "high": high,
        "candidates": float(np.mean([answer.best for answer in answers])),
        "log_prob": float(np.mean([answer.log_prob for answer in answers])),
        "chance": float(np.mean([1 / answer.num_candidates for answer in answers])),
        "n": len(answers),
    }


def passes(scores: Mapping[str, float]) -> bool:
    """Whether a length is recalled: at least `PASSES` exact, with the interval above chance."""
    return scores["exact"] >= PASSES and scores["low"] > scores["chance"]


def _by_kind_and_depth(answers: Sequence[Answer]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(answer.kind for answer in answers))
    return {
        "all": score(answers),
        **{kind: score([answer for answer in answers if answer.kind == kind]) for kind in sorted(kinds)},
        "depths": _by_depth(answers),
    }


def _heat_maps(answers: Mapping[int, Sequence[Answer]]) -> dict[str, dict[str, Any]]:
    """`{kind: {L: {depths: score}}}`: an edge where recall ends shows on the diagonal of fact and question."""
    kinds = sorted({answer.kind for part in answers.values() for answer in part})
    return {
        kind: {
            str(length): _by_depth([answer for answer in part if answer.kind == kind])
            for length, part in sorted(answers.items())
        }
        for kind in kinds
    }


def _by_depth(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    depths: dict[int, list[Answer]] = {}
    for answer in answers:
        depths.setdefault(min(int(answer.depth * NUM_DEPTHS), NUM_DEPTHS - 1), []).append(answer)
    return {f"{n / NUM_DEPTHS:g}-{(n + 1) / NUM_DEPTHS:g}": score(found) for n, found in sorted(depths.items())}
