"""Words and random draws of the stories made in the manner of bAbI."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
TOWNSPEOPLE = ("Bill", "Fred", "Julie", "Mary")
PRONOUNS = {"Daniel": "he", "John": "he", "Mary": "she", "Sandra": "she"}
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")
THINGS = ("apple", "football", "milk")

MOVES = ("went to", "went back to", "moved to", "journeyed to", "travelled to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")
GIVES = ("gave", "handed", "passed")
NEXT = ("Then", "After that", "Following that", "Afterwards")

OPPOSITES = {"north": "south", "south": "north", "east": "west", "west": "east"}
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}

_BLOCK = 128


class Dice:
    """Random choices, drawn as numbers in [0, 1) from `rng` in blocks.

    A long story takes hundreds of choices, and a call of a numpy generator for each of them would
    cost more than the rest of the story.
    """

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._numbers: list[float] = []

    def number(self) -> float:
        """The next number in [0, 1)."""
        if not self._numbers:
            self._numbers = self._rng.random(_BLOCK).tolist()
        return self._numbers.pop()

    def chance(self, share: float) -> bool:
        """True in a `share` (0 to 1) of the calls."""
        return self.number() < share

    def pick(self, items: Sequence[Item]) -> Item:
        """One of `items`, each as likely as the others."""
        return items[int(self.number() * len(items))]

    def pick_other(self, items: Sequence[Item], *taken: Item | None) -> Item:
        """One of `items` that is not among `taken`."""
        return self.pick([item for item in items if item not in taken])

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """All of `items` in a random order."""
        rest = list(items)
        return [rest.pop(int(self.number() * len(rest))) for _ in range(len(rest))]


def move_sentence(dice: Dice, who: str, place: str) -> str:
    """Such as "John travelled to the hallway."; `who` may begin with "After that"."""
    return f"{who} {dice.pick(MOVES)} the {place}."


def relation_sentence(dice: Dice, thing: str, direction: str, other: str) -> str:
    """That `thing` lies in `direction` of `other`, said from either of the two."""
    if dice.chance(0.5):
        return f"The {thing} is {direction} of the {other}."
    return f"The {other} is {OPPOSITES[direction]} of the {thing}."
