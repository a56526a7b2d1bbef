"""How often a run says what the conversation holds: the right day, product, order number or number of days in its answer.

    python examples/dialogue/compare.py data/dialogue runs/dialogue

Beside it stand the most frequent answer to each kind of question, and the same model with nothing but the last exchanges to read.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import mmctx
from mmctx.datasets.build.shards import read_shard
from mmctx.eval.documents import excerpt, grouped
from mmctx.eval.intervals import wilson_interval
from mmctx.generate import generate
from mmctx.pack import IGNORE_INDEX, Document, pack_documents

SLOTS = {
    "arrival": r"arrives on (\w+)",
    "product": r"is your (\w+)",
    "order": r"is order (\w+)",
    "return": r"for (\w+) days",
}
"""What of an answer to each kind of question has to be right."""
EXCHANGES = 4
"""Questions with their answers, the last one included, that the cut conversations keep."""
_BATCH = 8192  # tokens read at a time


class Question(NamedTuple):
    """What is asked, and the right slot."""

    asked: str
    slot: str


def slot_of(asked: str, answer: str) -> str:
    """The slot of an answer, empty where it has none."""
    match = re.search(SLOTS[asked], answer)
    return match[1] if match else ""


def kind_of(answer: str) -> str:
    """Which kind of question it answers."""
    return next(asked for asked in SLOTS if slot_of(asked, answer))


def read_answers(folder: Path) -> Iterator[list[str]]:
    """The learned answers of each conversation."""
    for path in sorted(folder.glob("*.tar")):
        for sample in read_shard(path):
            messages = json.loads(sample["json"])["messages"]
            answers = [m for m in messages if m["role"] == "assistant" and m.get("loss", True)]
            yield ["".join(part["text"] for part in answer["content"]) for answer in answers]


def read_questions(folder: Path) -> list[Question]:
    """The question at the end of each held-out conversation."""
    return [Question(kind_of(answer), slot_of(kind_of(answer), answer)) for (answer,) in read_answers(folder)]


def most_frequent(folders: list[Path]) -> dict[str, str]:
    """The commonest slot of each kind of question."""
    counts: dict[str, Counter[str]] = {asked: Counter() for asked in SLOTS}
    for answer in (answer for folder in folders for answers in read_answers(folder) for answer in answers):
        counts[kind_of(answer)][slot_of(kind_of(answer), answer)] += 1
    return {asked: slots.most_common(1)[0][0] if slots else "" for asked, slots in counts.items()}


def answers_of_run(run: Path) -> dict[str, list[str]]:
    """What a run's newest checkpoint writes to each question: after the whole conversation, and after its last exchanges."""
    model, tokenizer, config = mmctx.load_model(run)
    user = int(tokenizer.encode("User")[0])
    data = mmctx.build_dataset(config, held_out=True).dataset
    whole, cut = [], []
    for sample_id in range(data.tables[0].num_samples):
        (document,) = data.documents(0, sample_id, 0)
        end = int(np.flatnonzero(document.labels != IGNORE_INDEX)[0]) + 1  # where the answer begins
        starts = np.flatnonzero(document.input_ids[:end] == user)
        whole.append(excerpt(document, [(0, end)]))
        cut.append(excerpt(document, [(int(starts[-EXCHANGES]), end)]))
    return {"": _write(model, tokenizer, whole), f", last {EXCHANGES} exchanges alone": _write(model, tokenizer, cut)}


@torch.no_grad()
def _write(model: Any, tokenizer: Any, prompts: list[Document]) -> list[str]:
    found = []
    for group in grouped(prompts, [len(prompt.input_ids) for prompt in prompts], _BATCH):
        batch = pack_documents(group, tokenizer.placeholder_ids)
        found += [tokenizer.decode(ids) for ids in generate(model, batch, tokenizer.eos_id, max_new_tokens=10)]
    return found


def score(questions: list[Question], slots: list[str]) -> dict[str, tuple[float, float, float, int]]:
    """Share of right slots, its Wilson interval and the number of questions: of `all`, and of each kind."""
    right = [slot == question.slot for question, slot in zip(questions, slots, strict=True)]
    found = {}
    for name in ("all", *SLOTS):
        mine = [r for r, question in zip(right, questions, strict=True) if name in ("all", question.asked)]
        if mine:
            found[name] = (sum(mine) / len(mine), *wilson_interval(sum(mine), len(mine)), len(mine))
    return found


def compare(data: Path, run: Path) -> dict[str, dict[str, tuple[float, float, float, int]]]:
    """Scores by name."""
    questions = read_questions(data / "heldout")
    guess = most_frequent([data / "short", data / "long"])
    found = {"the most frequent answer": score(questions, [guess[question.asked] for question in questions])}
    for name, answers in answers_of_run(run).items():
        slots = [slot_of(question.asked, answer) for question, answer in zip(questions, answers, strict=True)]
        found[f"{run}{name}"] = score(questions, slots)
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    found = compare(arguments.data, arguments.run)
    kinds = list(next(iter(found.values())))
    print(f"| right answers, held out | 95% interval | {' | '.join(kinds)} |\n|---|---|{'---|' * len(kinds)}")
    for name, scores in found.items():
        shares = " | ".join(f"{scores[kind][0]:.3f}" for kind in kinds)
        print(f"| {name} | {scores['all'][1]:.3f} to {scores['all'][2]:.3f} | {shares} |")
    print(f"\n{' '.join(f'{kind} {scores[3]}' for kind, scores in found[next(iter(found))].items())} questions")


if __name__ == "__main__":
    main()
