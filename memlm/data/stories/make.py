"""Stories whose questions need one, two or three facts, none of which can be spared.

One: where somebody is. Two: where a thing is that was taken, handed over or put down. Three: where
a thing was before a place it was brought to. The supporting facts alone give the answer, and a
story that lacks any of them, or all, does not: where bAbI's own stories tell a thing twice, such
as somebody's putting down what is still where it was carried, another question is drawn.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from memlm.data.stories.house import Habits, House
from memlm.data.stories.reader import Event, Reader
from memlm.data.stories.story import Story
from memlm.data.stories.words import PEOPLE, Dice

_HABITS = Habits(take=0.24, drop=0.13, give=0.12, take_there=0.2)


def make_story(hops: int, sentences: int, rng: np.random.Generator) -> Story:
    """A new story; the same state of `rng` gives the same one.

    Args:
        hops: supporting facts of the question, one of HOPS.
        sentences: facts of the story, at least LEAST_SENTENCES; with three hops at most
            MOST_SENTENCES_OF_THREE, or it may take forever.
        rng: drawn from; how many numbers it gives differs between stories.
    """
    dice = Dice(rng)
    while True:
        house = House(dice, PEOPLE, _HABITS)
        house.live(sentences)
        for question, find, answer, supporting in dice.shuffled(_QUESTIONS[hops](house)):
            if len(supporting) == hops and _needed(house.events, find, answer, supporting):
                return Story(house.facts, question, answer, list(supporting))


# Of a question its words, how a reader answers it, the answer, and the numbers of the facts.
_Find = Callable[[Reader], str | None]
_Question = tuple[str, _Find, str, Sequence[int]]


def _where_people_are(house: House) -> list[_Question]:
    return [
        (f"Where is {who}?", lambda reader, who=who: reader.where(who), house.place[who], [fact])
        for who, fact in house.moved.items()
    ]


def _where_things_are(house: House) -> list[_Question]:
    return [
        (f"Where is the {thing}?", lambda reader, thing=thing: reader.where(thing), place, facts)
        for thing, (place, facts) in house.where_things_are().items()
    ]


def _where_things_were(house: House) -> list[_Question]:
    """Only of places that the thing came to once."""
    reader = Reader(house.events)
    return [
        (
            f"Where was the {one.thing} before the {one.after}?",
            lambda reader, one=one: reader.before(one.thing, one.after),
            one.before,
            one.supporting,
        )
        for one in house.carried
        if reader.visits(one.thing).count(one.after) == 1
    ]


_QUESTIONS: dict[int, Callable[[House], list[_Question]]] = {
    1: _where_people_are,
    2: _where_things_are,
    3: _where_things_were,
}


def _needed(events: Sequence[Event], find: _Find, answer: str, supporting: Sequence[int]) -> bool:
    """Whether the story and its supporting facts give the answer, and nothing less does."""

    def finds(places: Iterable[int]) -> bool:
        return find(Reader(events[place] for place in places)) == answer

    every = range(len(events))
    enough = finds(every) and finds(supporting)
    return enough and not any(
        finds(place for place in places if place not in left_out)
        for places in (every, supporting)
        for left_out in (*([one] for one in supporting), supporting)
    )
