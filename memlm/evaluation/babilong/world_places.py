"""Stories about people who walk and carry things: bAbI's question types 1, 2, 3, 5, 6, 7 and 8.

Only what a reader of the facts knows is asked about. A maker returns None when the story drawn has
no question with one clear answer, and is then called again.
"""

from memlm.data.stories.house import Habits, House
from memlm.data.stories.story import Story
from memlm.data.stories.words import GIVERS, PEOPLE, PLACES, Dice

_COUNTS = ("none", "one", "two", "three")


def where_is_person(dice: Dice) -> Story:
    """Type 1: the last place somebody went to."""
    house = House(dice, PEOPLE, Habits())
    house.live(dice.pick(range(2, 12, 2)))
    who = dice.pick(list(house.moved))
    return Story(house.facts, f"Where is {who}?", house.place[who], [house.moved[who]])


def where_is_thing(dice: Dice) -> Story | None:
    """Type 2: where a thing is that somebody carries or has left."""
    house = House(dice, PEOPLE, Habits(take=0.22, drop=0.15))
    house.live(dice.pick(range(2, 28, 2)))
    known = house.where_things_are()
    if not known:
        return None
    thing = dice.pick(list(known))
    place, supporting = known[thing]
    return Story(house.facts, f"Where is the {thing}?", place, supporting)


def where_thing_was(dice: Dice) -> Story | None:
    """Type 3: where a thing came from when it was brought to a place.

    Only places that the thing was at once are asked about, the place where it is now if it can be.
    """
    house = House(dice, PEOPLE, Habits(take=0.25, drop=0.18, take_there=0.2))
    house.live(dice.pick(range(6, 82, 2)))
    once = [
        carried
        for carried in house.carried
        if house.visits[carried.thing].count(carried.after) == 1
    ]
    now = [carried for carried in once if house.visits[carried.thing][-1] == carried.after]
    if not once:
        return None
    asked = dice.pick(now or once)
    question = f"Where was the {asked.thing} before the {asked.after}?"
    return Story(house.facts, question, asked.before, asked.supporting)


def who_gave_what(dice: Dice) -> Story | None:
    """Type 5: giver, thing or receiver of a gift; all gifts that fit the question agree."""
    house = House(dice, GIVERS, Habits(take=0.2, drop=0.11, give=0.28))
    house.live(dice.pick(range(2, 36, 2)))
    # The words of a question, what it asks for, and what it tells of the gift.
    forms = dice.shuffled(
        [
            ("What did {giver} give to {receiver}?", "thing", ("giver", "receiver")),
            ("What did {giver} give to {receiver}?", "thing", ("giver", "receiver")),
            ("Who gave the {thing} to {receiver}?", "giver", ("thing", "receiver")),
            ("Who did {giver} give the {thing} to?", "receiver", ("giver", "thing")),
            ("Who gave the {thing}?", "giver", ("thing",)),
            ("Who received the {thing}?", "receiver", ("thing",)),
        ]
    )
    for words, wanted, told in forms:
        for gift in reversed(house.gifts):
            fits = [
                other
                for other in house.gifts
                if all(getattr(other, key) == getattr(gift, key) for key in told)
            ]
            if len({getattr(other, wanted) for other in fits}) == 1:
                question = words.format_map(vars(gift))
                return Story(house.facts, question, getattr(gift, wanted), [gift.fact])
    return None


def is_person_there(dice: Dice) -> Story | None:
    """Type 6: whether somebody is at a place, yes as often as no."""
    house = House(dice, PEOPLE, Habits(take=0.25, drop=0.1))
    house.live(dice.pick(range(2, 12, 2)))
    if not house.moved:
        return None
    who = dice.pick(list(house.moved))
    yes = dice.chance(0.5)
    place = house.place[who] if yes else dice.pick_other(PLACES, house.place[who])
    question = f"Is {who} in the {place}?"
    return Story(house.facts, question, "yes" if yes else "no", [house.moved[who]])


def how_many_things(dice: Dice) -> Story | None:
    """Type 7: how many things somebody carries who had at least one."""
    house = House(dice, PEOPLE, Habits(take=0.26, drop=0.13, give=0.2))
    house.live(dice.pick(range(2, 16, 2)))
    who = _pick_holder(house)
    if who is None:
        return None
    question = f"How many objects is {who} carrying?"
    return Story(house.facts, question, _COUNTS[len(house.held[who])], house.handled[who])


def which_things(dice: Dice) -> Story | None:
    """Type 8: the things that somebody carries, in the order in which they were taken."""
    house = House(dice, PEOPLE, Habits(take=0.26, drop=0.12))
    house.live(dice.pick(range(2, 18, 2)))
    who = _pick_holder(house)
    if who is None:
        return None
    answer = ",".join(house.held[who]) or "nothing"
    return Story(house.facts, f"What is {who} carrying?", answer, house.handled[who])


def _pick_holder(house: House) -> str | None:
    """Somebody who held something, every number of things now held as likely as the others."""
    if not house.handled:
        return None
    amount = house.dice.pick(sorted({len(house.held[who]) for who in house.handled}))
    return house.dice.pick([who for who in house.handled if len(house.held[who]) == amount])
