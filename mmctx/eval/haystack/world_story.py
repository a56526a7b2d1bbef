"""A small world of people, places and objects, told in plain sentences, in the manner of bAbI (Weston et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
COUNTS = ("no", "one", "two", "three")
"""Words for how many objects one can carry."""


@dataclass
class Story:
    """A world under way: every sentence changes it.

    Attributes:
        sentences: what has happened, each with a space before it.
        place: of each person who went somewhere.
        holder: of each object that is carried.
        journeys: of each object that was carried, the places it has been in, in turn, none twice in a row.
    """

    sentences: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    journeys: dict[str, list[str]] = field(default_factory=dict)

    def carried_by(self, person: str) -> list[str]:
        """What a person carries."""
        return [thing for thing, holder in self.holder.items() if holder == person]

    def go(self, person: str, place: str) -> None:
        """A person goes to another place, and what they carry goes along."""
        self.sentences.append(f" {person} went to the {place}.")
        self.place[person] = place
        for thing in self.carried_by(person):
            self._note(thing, place)

    def take(self, person: str, thing: str) -> None:
        """A person picks up an object where they are."""
        self.sentences.append(f" {person} took the {thing}.")
        self.holder[thing] = person
        self._note(thing, self.place[person])

    def drop(self, person: str, thing: str) -> None:
        """A person leaves an object where they are."""
        self.sentences.append(f" {person} dropped the {thing}.")
        del self.holder[thing]

    def give(self, person: str, thing: str, other: str) -> None:
        """A person hands an object to another one in the same place."""
        self.sentences.append(f" {person} gave the {thing} to {other}.")
        self.holder[thing] = other

    def _note(self, thing: str, place: str) -> None:
        journey = self.journeys.setdefault(thing, [])
        if not journey or journey[-1] != place:
            journey.append(place)


def tell(sentences: int, rng: np.random.Generator) -> Story:
    """A story of so many sentences.

    Nothing in it distinguishes one person, place or object from another, so answers that are names are evenly spread.
    """
    story = Story()
    while len(story.sentences) < sentences:
        person = PEOPLE[rng.integers(len(PEOPLE))]
        here = story.place.get(person)
        action = rng.choice(["go", "take", "drop", "give"], p=[0.45, 0.35, 0.1, 0.1])
        carried = story.carried_by(person)
        if action == "go":
            elsewhere = [place for place in PLACES if place != here]
            story.go(person, elsewhere[rng.integers(len(elsewhere))])
        elif action == "take" and here:
            # where an object lies is not told before it is first taken: it may be anywhere
            free = [o for o in OBJECTS if o not in story.holder and story.journeys.get(o, [here])[-1] == here]
            if free:
                story.take(person, free[rng.integers(len(free))])
        elif action == "drop" and carried:
            story.drop(person, carried[rng.integers(len(carried))])
        elif action == "give" and carried:
            others = [other for other, place in story.place.items() if place == here and other != person]
            if others:
                story.give(person, carried[rng.integers(len(carried))], others[rng.integers(len(others))])
    return story
