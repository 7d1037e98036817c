"""A slow reader of stories that knows nothing but their text: it tries all possible worlds."""

import re
from collections.abc import Sequence

import numpy as np

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
MOVE = re.compile(r"(\w+) (?:went|went back|moved|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:took|got|grabbed|picked up) the (\w+)(?: there)?\.")
DROP = re.compile(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
WHERE = re.compile(r"Where is (?:the )?(\w+)\?")
BEFORE = re.compile(r"Where was the (\w+) before the (\w+)\?")


def possible_answers(facts: Sequence[str], question: str) -> set[str | None]:
    """The answers in all worlds where the facts hold; None = a world in which there is none.

    A world is where every person and thing is at first. A thing is at the place of whoever takes
    it, and whoever hands it over is at the place of whoever gets it. "Before a place" means where
    the thing was when it came there for the last time.
    """
    asked = BEFORE.fullmatch(question) or WHERE.fullmatch(question)
    assert asked, question
    names = {asked[1]: 0}
    for fact in facts:
        move = MOVE.fullmatch(fact)
        found = move or TAKE.fullmatch(fact) or DROP.fullmatch(fact) or GIVE.fullmatch(fact)
        assert found, fact
        for name in found.groups()[:1] if move else found.groups():
            names.setdefault(name, len(names))
    where = np.indices((len(PLACES),) * len(names), dtype=np.int8).reshape(len(names), -1)
    alive = np.ones(where.shape[1], dtype=bool)
    before = np.full(where.shape[1], -1, dtype=np.int8)
    holder: dict[str, str] = {}
    for fact in facts:
        old = where[names[asked[1]]].copy()
        if move := MOVE.fullmatch(fact):
            for name in (move[1], *(thing for thing, who in holder.items() if who == move[1])):
                where[names[name]] = PLACES.index(move[2])
        elif taken := TAKE.fullmatch(fact):
            who, thing = taken.groups()
            if thing not in holder:
                alive &= where[names[who]] == where[names[thing]]
            where[names[thing]] = where[names[who]]
            holder[thing] = who
        elif given := GIVE.fullmatch(fact):
            who, thing, receiver = given.groups()
            alive &= where[names[who]] == where[names[receiver]]
            where[names[thing]] = where[names[receiver]]
            holder[thing] = receiver
        elif dropped := DROP.fullmatch(fact):
            where[names[dropped[2]]] = where[names[dropped[1]]]
            holder.pop(dropped[2], None)
        if len(asked.groups()) == 2:
            new = where[names[asked[1]]]
            came = (new != old) & (new == PLACES.index(asked[2]))
            before[came] = old[came]
    values = before if len(asked.groups()) == 2 else where[names[asked[1]]]
    return {PLACES[value] if value >= 0 else None for value in np.unique(values[alive]).tolist()}
