"""Suite `knowledge`: does a model answer from a store, and does the answer follow when the store is changed?

Facts are put into a store, embedded by the model's own similarity head; then some are changed, then removed. After each, the same questions
are asked with what the store finds in front, and once more without it: the off switch. Answers are compared by log-probability among all
values that any fact has (`answers`). Nothing is trained: what an answer follows is the store.

Shapes: C candidates.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.datasets.decode import decode_image
from mmctx.errors import ConfigError, DataError
from mmctx.eval.answers import continuation_log_probs
from mmctx.eval.config import EvalConfig
from mmctx.eval.context import EvalContext
from mmctx.eval.intervals import wilson_interval
from mmctx.eval.packages import require
from mmctx.generate import read_prompts
from mmctx.objectives.base import lay_out
from mmctx.pack import IGNORE_INDEX, Document, MediaItem, pack_documents
from mmctx.store.entries import Document as Entry
from mmctx.store.entries import Part

STATES = ("put", "changed", "removed")


@dataclass(frozen=True, slots=True)
class Question:
    """A line of the questions' file.

    Attributes:
        id: of the fact in the store.
        question: what is asked; the answer comes right behind it.
        fact: the same as it stands in the store, `{}` where the answer goes.
        answers: the first, and what it is changed to.
        image: of the fact and of the question; None if they are text alone.
        asked: False for facts that are only there to be confused with.
    """

    id: str
    question: str
    fact: str
    answers: tuple[str, str]
    image: bytes | None
    asked: bool

    def entry(self, state: int) -> Entry:
        """The document that says it, with its first or second answer."""
        text = Part("text", self.fact.replace("{}", self.answers[state]))
        return Entry(self.id, (text,) if self.image is None else (Part("image", media=self.image), text))


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSON-lines file: `{"id", "question", "answers": [first, changed]}` and, if wanted, `fact` (the question and ` {}`
    by default), `image` (a file beside it), `asked`.

    Raises:
        DataError: the file cannot be read, or a line of it is no question.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); eval.knowledge.questions names it") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            first, second = row["answers"]
            image = (path.parent / row["image"]).read_bytes() if row.get("image") else None
            fact = row.get("fact", f"{row['question']} {{}}")
            if first == second or "{}" not in fact or not (row["question"] or image):
                raise ValueError("answers must differ, fact must hold {}, and there must be a question or an image")
            found.append(Question(row["id"], row["question"], fact, (first, second), image, row.get("asked", True)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path}: line {number}: no question ({error!r}): {line[:80]!r}") from None
    if not any(question.asked for question in found):
        raise DataError(f"{path}: asks nothing")
    return found


def check_knowledge(config: EvalConfig) -> None:
    """See `Suite.check`."""
    if config.knowledge is None:
        raise ConfigError(
            "suite knowledge: eval.knowledge is not set; name its questions by eval.knowledge.questions=FILE"
        )
    require("lancedb", extra="memory")
    read_questions(Path(config.knowledge.questions))


def evaluate_knowledge(context: EvalContext) -> dict[str, Any]:
    """`{state: {"accuracy", "low", "high", "cited"}, "without": {...}, "chance", "n"}` for each of `STATES`; `changed` and `removed` also
    have `stale`, the share of answers that the store held before.

    `accuracy` is the share of the answer that the store holds (after the removal: held last, so that it must fall to chance), `cited` that
    of questions whose own fact was found. Empty where the run has no similarity objective.
    """
    from mmctx.store.encoders.checkpoint import CheckpointEncoder
    from mmctx.store.ingest import ingest
    from mmctx.store.store import Store

    heads = [name for name, objective in context.objectives.items() if objective.kind == "similarity"]
    if not heads or context.config.knowledge is None:
        return {}
    questions = read_questions(Path(context.config.knowledge.questions))
    asked = [question for question in questions if question.asked]
    data, media = context.data, next(iter(context.data.tables.values())).preprocessors
    half: Any = data.dataset.objectives[heads[0]]
    encoder = CheckpointEncoder(
        context.model, data.tokenizer, half, media, data.config, name="evaluated", fingerprint="evaluated"
    )
    reader = _Reader(context, media, sorted({answer for question in questions for answer in question.answers}))
    results: dict[str, Any] = {"chance": 1 / len(reader.candidates), "n": len(asked)}
    with tempfile.TemporaryDirectory(prefix="mmctx-knowledge-") as folder:  # of this rank alone
        store = Store.create(Path(folder) / "store", encoder.provenance)
        for state in STATES:
            if state == "put":
                ingest(store, encoder, [question.entry(0) for question in questions])
            elif state == "changed":
                ingest(store, encoder, [question.entry(1) for question in asked])
            else:
                store.remove([question.id for question in asked])
            found = context.map(
                f"knowledge: {state}", asked, lambda question: reader.with_store(question, store, encoder)
            )
            results[state] = _summary(state, asked, found)
        alone = context.map("knowledge: without", asked, reader.without)
    return results | {"without": _summary("without", asked, [(choice, False) for choice in alone])}


class _Reader:
    """Asks the model."""

    def __init__(self, context: EvalContext, media: Any, candidates: Sequence[str]) -> None:
        self._context, self._media, self.candidates = context, media, list(candidates)
        self._ids = context.data.tokenizer.encode_many([f" {one}" for one in candidates])
        if empty := [one for one, ids in zip(candidates, self._ids, strict=True) if not len(ids)]:
            raise DataError(f"suite knowledge: the tokenizer makes 0 tokens of the answer {empty[0]!r}")

    def with_store(self, question: Question, store: Any, encoder: Any) -> tuple[str, bool]:
        """(answer, whether its fact was cited)."""
        from mmctx.store.recall import recall

        asking = _segments(question)
        config = self._context.config.knowledge
        assert config is not None
        found = recall(store, encoder, asking, config.neighbours, numbered=config.numbered)
        cited = any(citation.document.id == question.id for citation in found.citations)
        return self._choose(found.segments), cited

    def without(self, question: Question) -> str:
        """The answer with the store switched off."""
        return self._choose(_segments(question))

    def _choose(self, segments: Sequence[tuple[str, Any]]) -> str:
        model, tokenizer = self._context.model, self._context.data.tokenizer
        parts: list[np.ndarray | MediaItem] = [
            tokenizer.encode(value) if kind == "text" else self._media.image(decode_image(value))
            for kind, value in segments
        ]
        parts = [part for part in parts if isinstance(part, MediaItem) or len(part)]
        input_ids, media = lay_out([tokenizer.begin, *parts], tokenizer.placeholder_ids)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        prompt = Document("knowledge", input_ids, labels, causal=True, media=media)
        batch = pack_documents([prompt], tokenizer.placeholder_ids).to(self._context.device)
        last, cache = read_prompts(model, batch, 1)
        nothing = [np.zeros(0, np.int64)] * len(self._ids)
        scores = continuation_log_probs(model, last[0], cache, 0, nothing, self._ids)
        return self.candidates[int(np.argmax(scores))]


def _segments(question: Question) -> list[tuple[Any, Any]]:
    image = [] if question.image is None else [("image", question.image)]
    return [*image, *([("text", question.question)] if question.question else [])]


def _summary(state: str, asked: Sequence[Question], found: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    wanted = [question.answers[0 if state == "put" else 1] for question in asked]
    right = sum(choice == want for (choice, _), want in zip(found, wanted, strict=True))
    low, high = wilson_interval(right, len(asked))
    result: dict[str, Any] = {"accuracy": right / len(asked), "low": low, "high": high}
    if state != "without":
        result["cited"] = sum(cited for _, cited in found) / len(asked)
    if state in ("changed", "removed"):
        result["stale"] = sum(c == q.answers[0] for (c, _), q in zip(found, asked, strict=True)) / len(asked)
    return result


def knowledge_headline(results: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy in each state, and without the store."""
    return {name: results[name]["accuracy"] for name in (*STATES, "without")}
