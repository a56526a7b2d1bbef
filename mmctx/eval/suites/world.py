"""Suite `world`: questions about a story whose sentences are spread over a document of L tokens, in the manner of bAbI (Weston et al. 2016)
and BABILong (Kuratov et al. 2024).

| task | asked |
|---|---|
| `where_person` | the place of a person: where they went last |
| `where_object` | the place of an object: who has it, or left it, and where |
| `before` | the place of an object before another place |
| `has` | who carries an object |
| `count` | how many objects a person carries |

The simulator is our own (`mmctx.eval.haystack.world_story`). An answer is exact by BABILong's rule: of all words that could be the answer,
its first sentence holds the right one and no other, those of the question aside.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mmctx.eval.context import EvalContext
from mmctx.eval.haystack.config import WorldConfig
from mmctx.eval.haystack.grid import Kind, run_grid
from mmctx.eval.haystack.probe import Needle, Probe, ranked
from mmctx.eval.haystack.sources import open_haystack
from mmctx.eval.haystack.words import spread
from mmctx.eval.haystack.world_story import COUNTS, OBJECTS, PEOPLE, PLACES, Story, tell


class Asked(NamedTuple):
    """A question about a story; `stem` is what the answer continues, `labels` are all possible answers, `given` those that it names."""

    question: str
    stem: str
    answer: str
    labels: tuple[str, ...]
    given: tuple[str, ...] = ()


def evaluate_world(context: EvalContext) -> dict[str, Any]:
    """See `mmctx.eval.haystack.grid.run_grid`; its kinds are the tasks. Empty where no held-out source serves captioning."""
    config = context.config.world
    for objective in context.names("captioning")[:1]:
        kinds = {task: Kind(functools.partial(make_world, task, config), "labels", False) for task in config.tasks}
        return run_grid(context, "world", config, kinds, open_haystack(config.haystack, context.data.only(objective)))
    return {}


def make_world(task: str, config: WorldConfig, rng: np.random.Generator, depth: float | None) -> Probe:
    """A story and one question about it, whose answers are evenly spread: so chance is one in as many as there are."""
    count = COUNTS[
        rng.integers(len(COUNTS))
    ]  # few carry much: stories are drawn until one has the answer that was drawn
    while True:
        story = tell(config.facts, rng)
        questions = TASKS[task](story)
        if task == "count":
            questions = [asked for asked in questions if asked.answer == count]
        if questions:
            break
    asked = questions[rng.integers(len(questions))]
    needles = tuple(map(Needle, ((s,) for s in story.sentences), spread(rng, len(story.sentences))))
    labels = [label for label in asked.labels if label not in asked.given]
    return Probe(
        task,
        needles,
        (f" {asked.question} {asked.stem}",),
        (ranked(labels, [asked.answer], rng),),
        (asked.answer,),
        (),
        (f" {asked.answer}",),
        labels=asked.labels,
        asked_labels=asked.given,
    )


def _where_person(story: Story) -> list[Asked]:
    return [Asked(f"Where is {p}?", f"{p} is in the", place, PLACES) for p, place in story.place.items()]


def _where_object(story: Story) -> list[Asked]:
    return [Asked(f"Where is the {o}?", f"The {o} is in the", j[-1], PLACES) for o, j in story.journeys.items()]


def _before(story: Story) -> list[Asked]:
    return [
        Asked(
            f"Where was the {thing} before the {later}?", f"Before, the {thing} was in the", earlier, PLACES, (later,)
        )
        for thing, journey in story.journeys.items()
        for earlier, later in itertools.pairwise(journey)
        if journey.count(later) == 1
    ]


def _has(story: Story) -> list[Asked]:
    return [
        Asked(f"Who has the {thing}?", f"The {thing} is carried by", person, PEOPLE)
        for thing, person in story.holder.items()
    ]


def _count(story: Story) -> list[Asked]:
    return [
        Asked(f"How many objects is {p} carrying?", f"{p} is carrying", COUNTS[len(story.carried_by(p))], COUNTS)
        for p in PEOPLE
    ]


TASKS: dict[str, Callable[[Story], list[Asked]]] = {
    "where_person": _where_person,
    "where_object": _where_object,
    "before": _before,
    "has": _has,
    "count": _count,
}
"""All questions that a story answers, by task."""
assert len(OBJECTS) == len(COUNTS) - 1
