"""Stories about who is where, said less plainly: bAbI's question types 9 to 14.

Negation, indefinite knowledge, pronouns, pairs of people and times of the day.
"""

from memlm.data.stories.story import Story
from memlm.data.stories.words import (
    MOVES,
    NEXT,
    PEOPLE,
    PLACES,
    PRONOUNS,
    TOWN,
    TOWNSPEOPLE,
    Dice,
    move_sentence,
)

_TIMES = ("yesterday", "this morning", "this afternoon", "this evening")


def negation(dice: Dice) -> Story:
    """Type 9: whether somebody is at a place, where some facts say only where they are not.

    After "is no longer in" a reader knows one place where the person is not; only that one is
    asked about.
    """
    facts: list[str] = []
    known: dict[str, tuple[str, bool, int]] = {}  # place, whether the person is there, fact
    for fact in range(dice.pick(range(2, 12, 2))):
        who = dice.pick(PEOPLE)
        place, there, _ = known.get(who, (None, True, 0))
        if there and dice.chance(0.35):
            place = place or dice.pick(PLACES)
            facts.append(f"{who} is {dice.pick(('not', 'no longer'))} in the {place}.")
            known[who] = (place, False, fact)
        else:
            place = dice.pick_other(PLACES, place)
            facts.append(_arrival(dice, who, place))
            known[who] = (place, True, fact)
    who = dice.pick(list(known))
    place, there, fact = known[who]
    yes = there and dice.chance(0.6)
    if there and not yes:
        place = dice.pick_other(PLACES, place)
    return Story(facts, f"Is {who} in the {place}?", "yes" if yes else "no", [fact])


def indefinite_knowledge(dice: Dice) -> Story:
    """Type 10: whether somebody is at a place, where some facts leave two places open."""
    facts: list[str] = []
    known: dict[str, tuple[tuple[str, ...], int]] = {}  # places that may be, fact
    for fact in range(dice.pick(range(2, 12, 2))):
        who = dice.pick(TOWNSPEOPLE)
        # A place that was open before would leave two readings: still there, or come back.
        before = known[who][0] if who in known else ()
        first = dice.pick_other(TOWN, *before)
        if dice.chance(0.38):
            second = dice.pick_other(TOWN, first, *before)
            facts.append(f"{who} is either in the {first} or the {second}.")
            known[who] = ((first, second), fact)
        else:
            facts.append(_arrival(dice, who, first))
            known[who] = ((first,), fact)
    who = dice.pick(list(known))
    places, fact = known[who]
    inside = dice.chance(0.55 if len(places) == 1 else 0.8)
    place = dice.pick(places) if inside else dice.pick_other(TOWN, *places)
    answer = ("yes" if len(places) == 1 else "maybe") if inside else "no"
    return Story(facts, f"Is {who} in the {place}?", answer, [fact])


def coreference(dice: Dice) -> Story:
    """Type 11: every second fact says "he" or "she" for the person of the fact before it."""
    return _walks(dice, together=1, pronoun=True)


def conjunction(dice: Dice) -> Story:
    """Type 12: two people go together."""
    return _walks(dice, together=2, pronoun=False)


def compound_coreference(dice: Dice) -> Story:
    """Type 13: two people go together, and on as "they"."""
    return _walks(dice, together=2, pronoun=True)


def time_reasoning(dice: Dice) -> Story | None:
    """Type 14: where somebody was before a place, with the facts in no order of time.

    Nobody is twice at one place, and nobody's day has a gap between two known times.
    """
    size = dice.pick(range(2, 16, 2))
    counts = dict.fromkeys(TOWNSPEOPLE, 0)
    for _ in range(size):
        open_people = [who for who, count in counts.items() if count < len(_TIMES)]
        counts[dice.pick(open_people)] += 1
    days: dict[str, list[tuple[str, str]]] = {}  # who: their places in order, each with the time
    for who, count in counts.items():
        start = dice.pick(range(len(_TIMES) - count + 1))
        days[who] = list(zip(dice.shuffled(TOWN), _TIMES[start : start + count], strict=False))
    order = dice.shuffled([(who, place, time) for who in days for place, time in days[who]])
    asked = [who for who, count in counts.items() if count > 1]
    if not asked:
        return None
    who = dice.pick(asked)
    later = dice.pick(range(1, counts[who]))
    before, after = days[who][later - 1], days[who][later]
    supporting = sorted(order.index((who, *visit)) for visit in (before, after))
    facts = [_timed(dice, *visit) for visit in order]
    return Story(facts, f"Where was {who} before the {after[0]}?", before[0], supporting)


def _arrival(dice: Dice, who: str, place: str) -> str:
    """That somebody comes to a place or is there."""
    phrase = "is in" if dice.chance(0.4) else dice.pick(MOVES)
    return f"{who} {phrase} the {place}."


def _timed(dice: Dice, who: str, place: str, time: str) -> str:
    """A move with its time, at the beginning or the end of the sentence."""
    sentence = move_sentence(dice, who, place)
    if dice.chance(0.5):
        return f"{time.capitalize()} {sentence}"
    return f"{sentence[:-1]} {time}."


def _walks(dice: Dice, together: int, pronoun: bool) -> Story:
    """People walk, `together` of them at once; with `pronoun` each walk has two facts."""
    facts: list[str] = []
    place: dict[str, str] = {}
    because: dict[str, list[int]] = {}
    steps = 2 if pronoun else 1
    for _ in range(dice.pick(range(2, 12, 2)) // steps):
        people = dice.shuffled(PEOPLE)[:together]
        numbers = list(range(len(facts), len(facts) + steps))
        subject = " and ".join(people)
        for step in range(steps):
            target = dice.pick_other(PLACES, *(place.get(who) for who in people))
            if step:
                subject = f"{dice.pick(NEXT)} {PRONOUNS[people[0]] if together == 1 else 'they'}"
            facts.append(move_sentence(dice, subject, target))
            place.update(dict.fromkeys(people, target))
        because.update(dict.fromkeys(people, numbers))
    who = dice.pick(list(place))
    return Story(facts, f"Where is {who}?", place[who], because[who])
