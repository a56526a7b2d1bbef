"""Suite `world`: stories read back by another reader, answers evenly spread, the originals' rule of labels."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from mmctx.eval.haystack.config import WORLD_TASKS, WorldConfig
from mmctx.eval.haystack.probe import Probe
from mmctx.eval.haystack.world_story import COUNTS, OBJECTS, PEOPLE, PLACES, tell
from mmctx.eval.suites.world import make_world


def make(task: str, seed: int) -> Probe:
    return make_world(task, WorldConfig(), np.random.default_rng(seed), None)


def facts(probe: Probe) -> list[tuple[str, ...]]:
    """(verb, words) of each sentence, from the text alone."""
    found = []
    for needle in probe.needles:
        (sentence,) = needle.parts
        assert isinstance(sentence, str)
        match = re.fullmatch(r" (\w+) (went to|took|dropped|gave) the (\w+)(?: to (\w+))?\.", sentence)
        assert match
        found.append(match.groups())
    return found


def where_was(probe: Probe, thing: str) -> list[str]:
    """Places of an object after each sentence, worked out backwards: whoever held it then, and where they had gone last."""
    told = facts(probe)
    places: list[str] = []
    for end in range(1, len(told) + 1):
        changes = [n for n in range(end) if told[n][1] != "went to" and told[n][2] == thing]
        if not changes:
            continue
        person, verb, _, other = told[changes[-1]]
        holder = other if verb == "gave" else person
        until = changes[-1] if verb == "dropped" else end
        moves = [place for who, did, place, _ in told[:until] if who == holder and did == "went to"]
        if not places or places[-1] != moves[-1]:
            places.append(moves[-1])
    return places


@pytest.mark.parametrize("seed", range(60))
def test_another_reader_gives_the_same_answers(seed: int) -> None:
    for task in WORLD_TASKS:
        probe = make(task, seed)
        (question,), (answer,) = probe.question, probe.references
        assert isinstance(question, str)
        told = facts(probe)
        assert len(told) == WorldConfig().facts
        assert [needle.depth for needle in probe.needles] == sorted(needle.depth for needle in probe.needles)
        if task == "where_person":
            person = re.search(r"Where is (\w+)\?", question)[1]  # type: ignore[index]
            assert answer == [place for who, verb, place, _ in told if who == person and verb == "went to"][-1]
        elif task == "where_object":
            assert answer == where_was(probe, re.search(r"is the (\w+)\?", question)[1])[-1]  # type: ignore[index]
        elif task == "before":
            thing, later = re.search(r"was the (\w+) before the (\w+)\?", question).groups()  # type: ignore[union-attr]
            journey = where_was(probe, thing)
            assert journey[journey.index(later) - 1] == answer
            assert journey.index(later) > 0
            assert probe.asked_labels == (later,)
        else:
            holders: dict[str, str] = {}
            for person, verb, thing, other in told:
                if verb == "dropped":
                    assert holders.pop(thing) == person
                elif verb != "went to":
                    holders[thing] = other or person
            if task == "has":
                assert answer == holders[re.search(r"has the (\w+)\?", question)[1]]  # type: ignore[index]
            else:
                person = re.search(r"is (\w+) carrying", question)[1]  # type: ignore[index]
                assert answer == COUNTS[list(holders.values()).count(person)]


@pytest.mark.parametrize("task", WORLD_TASKS)
def test_no_answer_is_likelier_than_another(task: str) -> None:
    """Chance is what whoever has not read the story can reach: chi-squared of the answers against an even spread."""
    n = 600
    answers = Counter(make(task, seed).references[0] for seed in range(n))
    labels = {"has": PEOPLE, "count": COUNTS}.get(task, PLACES)
    assert set(answers) == set(labels)
    expected = n / len(labels)
    assert sum((count - expected) ** 2 / expected for count in answers.values()) < 20.5  # 0.1% for 5 degrees of freedom
    probe = make(task, 0)
    assert probe.chance == pytest.approx(1 / (len(labels) - (task == "before")))


def test_stories_obey_their_world() -> None:
    """Nobody takes what another holds, gives to who is elsewhere, or goes where they are."""
    for seed in range(100):
        story = tell(15, np.random.default_rng(seed))
        place: dict[str, str] = {}
        holder: dict[str, str] = {}
        left: dict[str, str] = {}
        for sentence in story.sentences:
            person, *rest = sentence.strip(" .").split()
            if rest[0] == "went":
                assert place.get(person) != rest[-1]
                place[person] = rest[-1]
            elif rest[0] == "took":
                assert rest[-1] not in holder
                assert left.get(rest[-1], place[person]) == place[person]
                holder[rest[-1]] = person
            elif rest[0] == "dropped":
                assert holder.pop(rest[-1]) == person
                left[rest[-1]] = place[person]
            else:
                assert holder[rest[2]] == person != rest[-1]
                assert place[rest[-1]] == place[person]
                holder[rest[2]] = rest[-1]
        assert story.holder == holder
        assert story.place == place
        assert set(holder) <= set(OBJECTS)
